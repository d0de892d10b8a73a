"""Watch a server: probe its models, read its own figures, tell Prometheus and a person."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede_ops.errors import HalimedeError

MEMORY_LIMIT = 0.9
"""Share of the memory in use above which a server is unhealthy."""
SCRAPE_TIMEOUT_S = 5.0
FIGURES = {
    "memory": ("nv_cpu_memory_used_bytes", "nv_cpu_memory_total_bytes"),
    "cpu": ("nv_cpu_utilization", None),
    "gpu_memory": ("nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"),
    "gpu": ("nv_gpu_utilization", None),
}
"""Share in use → metric of Triton, and the metric of the whole where it is not a share already."""


class Monitor:
    """Probes models one after another and remembers how each was."""

    def __init__(self, embedders: Mapping[str, Embedder], metrics_url: str | None) -> None:
        """Nothing is asked yet.

        Args:
            embedders: one a model, by the model's name.
            metrics_url: Triton's metrics; None: only the probes say how the server is.
        """
        self._embedders = embedders
        self._metrics_url = metrics_url
        self.shares: dict[str, float] = {}
        """Share of memory, cpu, gpu_memory and gpu in use, of what the server tells."""
        self.reports: dict[str, dict[str, Any]] = {}
        """Each model's last report, as `Embedder.health` gives it."""

    def look(self) -> Iterator[str]:
        """Probe every model once; one line for each whose health is not what it was."""
        self.shares = self._read_shares()
        for model, embedder in self._embedders.items():
            before = self.reports.get(model, {}).get("healthy")
            report = self.reports[model] = self._judged(embedder.health()[0])
            if report["healthy"] != before:
                yield f"{model}: {_told(report)}"

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks for: the last look's metrics."""
        from prometheus_client.core import GaugeMetricFamily

        healthy = GaugeMetricFamily(
            "halimede_probe_healthy", "1: the probe text was embedded in time.", labels=["model"]
        )
        seconds = GaugeMetricFamily(
            "halimede_probe_seconds", "Seconds the probe took.", labels=["model"]
        )
        for model, report in list(self.reports.items()):
            healthy.add_metric([model], float(report["healthy"]))
            if "latency_ms" in report:
                seconds.add_metric([model], report["latency_ms"] / 1000)
        used = GaugeMetricFamily(
            "halimede_server_used_ratio", "Share of the resource in use.", labels=["resource"]
        )
        for resource, share in self.shares.items():
            used.add_metric([resource], share)
        yield from (healthy, seconds, used)

    def _judged(self, report: dict[str, Any]) -> dict[str, Any]:
        """A report that also answers for the server's memory."""
        full = [
            f"{share:.0%} of the {resource.replace('_', ' ')} is used"
            for resource, share in self.shares.items()
            if "memory" in resource and share > MEMORY_LIMIT
        ]
        if not full:
            return report
        return {**report, "healthy": False, "error": report.get("error") or "; ".join(full)}

    def _read_shares(self) -> dict[str, float]:
        if self._metrics_url is None:
            return {}
        httpx = import_optional("httpx", "metrics")
        parser = import_optional("prometheus_client.parser", "metrics")
        try:
            answer = httpx.get(self._metrics_url, timeout=SCRAPE_TIMEOUT_S).raise_for_status()
        except httpx.HTTPError:
            return {}
        # The highest of several GPUs counts.
        values: dict[str, float] = {}
        for family in parser.text_string_to_metric_families(answer.text):
            for sample in family.samples:
                values[sample.name] = max(sample.value, values.get(sample.name, 0.0))
        return {
            resource: values[part] / (values[whole] if whole else 1.0)
            for resource, (part, whole) in FIGURES.items()
            if part in values and (whole is None or values.get(whole))
        }


def watch(
    monitor: Monitor, every_s: float, tell: Callable[[str], None], rounds: int | None = None
) -> None:
    """Look every `every_s` seconds and tell what changes; without `rounds`, until interrupted."""
    done = 0
    while rounds is None or done < rounds:
        began = time.monotonic()
        for line in monitor.look():
            tell(line)
        done += 1
        if rounds is None or done < rounds:
            time.sleep(max(0.0, began + every_s - time.monotonic()))


def _told(report: dict[str, Any]) -> str:
    if report["healthy"]:
        return f"healthy, {report['latency_ms']:.0f} ms"
    return f"unhealthy: {report.get('error') or 'the probe took {latency_ms} ms'.format(**report)}"


def serve_metrics(monitor: Monitor, host: str, port: int) -> Any:
    """A server of the monitor's metrics on `host:port`, running in a thread; 0: any free port.

    Raises:
        MissingExtra: prometheus-client is not installed.
        HalimedeError: the port is taken.
    """
    prometheus = import_optional("prometheus_client", "metrics")
    registry = prometheus.CollectorRegistry()
    registry.register(monitor)
    try:
        return prometheus.start_http_server(port, host, registry)[0]
    except OSError as error:
        raise HalimedeError(f"{host}:{port} cannot be listened on: {error.strerror}.") from None
