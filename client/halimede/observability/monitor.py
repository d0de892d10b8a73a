"""Monitor a server: probe its models, read its metrics, report to Prometheus and to a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede.observability import server_memory
from halimede_ops.errors import HalimedeError, InvalidInput

MEMORY_LIMIT = 0.9
"""Share of memory in use above which a server is unhealthy."""
SCRAPE_TIMEOUT_S = 5.0
MAX_PORT = 65535
DEFAULT_PORTS = {"http": 80, "https": 443}
SHARE_METRICS = {
    "machine_memory": ("nv_cpu_memory_used_bytes", "nv_cpu_memory_total_bytes"),
    "machine_cpu": ("nv_cpu_utilization", None),
    "gpu_memory": ("nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"),
    "gpu": ("nv_gpu_utilization", None),
}
"""Resource → Triton's metric of its use, and the metric to divide it by; None: it is a share.
These are shares of the whole machine and of whole GPUs, not of the server."""
MEMORY = "memory"
"""Resource: the server's own memory, of what it may use. Known if it runs on this machine."""
IN_WORDS = {
    MEMORY: "server's memory",
    "machine_memory": "machine's memory",
    "gpu_memory": "GPU memory",
}
"""Resources of which too much in use makes a server unhealthy."""


class Monitor:
    """Probes models one after another and keeps the last report of each."""

    def __init__(self, embedders: Mapping[str, Embedder], metrics_url: str | None) -> None:
        """Take what to probe; sends no request.

        Args:
            embedders: One embedder per model, by the model's name.
            metrics_url: Triton's metrics. None: health depends on the probes alone.

        Raises:
            InvalidInput: `metrics_url` is no URL.
        """
        if metrics_url is not None:
            _check_url(metrics_url)
        self._embedders = embedders
        self._metrics_url = metrics_url
        self.shares: dict[str, float] = {}
        """Share in use, 0 to 1, where it is known: `memory` of the server itself; `machine_memory`,
        `machine_cpu`, `gpu_memory` and `gpu` of its machine.
        """
        self.reports: dict[str, dict[str, Any]] = {}
        """Each model's last report, as `Embedder.health` returns it."""

    def probe(self) -> Iterator[str]:
        """Probe every model once; yield a line for each whose health has changed."""
        self.shares = self._read_shares()
        for model, embedder in self._embedders.items():
            before = self.reports.get(model, {}).get("healthy")
            report = self.reports[model] = self._with_memory(embedder.health()[0])
            if report["healthy"] != before:
                yield f"{model}: {_in_words(report)}"

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of the last probes, for Prometheus."""
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
            "halimede_server_used_ratio",
            "Share in use: memory of the server itself; the others of its machine.",
            labels=["resource"],
        )
        for resource, share in self.shares.items():
            used.add_metric([resource], share)
        yield from (healthy, seconds, used)

    def _with_memory(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report; unhealthy if the server's memory is nearly full. The machine's memory counts
        if the server's is unknown.
        """
        counting = {*IN_WORDS} - ({"machine_memory"} if MEMORY in self.shares else set())
        full = [
            f"{share:.0%} of the {IN_WORDS[resource]} is used"
            for resource, share in self.shares.items()
            if resource in counting and share > MEMORY_LIMIT
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
        # Of several GPUs, the one used most.
        values: dict[str, float] = {}
        for family in parser.text_string_to_metric_families(answer.text):
            for sample in family.samples:
                values[sample.name] = max(sample.value, values.get(sample.name, 0.0))
        parts = urlsplit(self._metrics_url)
        own = server_memory.share(parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme])
        return ({} if own is None else {MEMORY: own}) | {
            resource: values[used] / (values[total] if total else 1.0)
            for resource, (used, total) in SHARE_METRICS.items()
            if used in values and (total is None or values.get(total))
        }


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_valid = bool(parts.hostname) and parts.scheme in DEFAULT_PORTS and parts.port != 0
    except ValueError:  # a port above 65535
        is_valid = False
    if not is_valid:
        raise InvalidInput(
            f"the metrics' url is {url!r}; give one such as http://127.0.0.1:8002/metrics. A port "
            "is 1 to 65535."
        )


def watch(
    monitor: Monitor, every_s: float, report: Callable[[str], None], rounds: int | None = None
) -> None:
    """Probe every `every_s` seconds and report each change; without `rounds`, until interrupted.

    Raises:
        InvalidInput: `every_s` or `rounds` is not above 0.
    """
    check_intervals(every_s, rounds)
    done = 0
    while rounds is None or done < rounds:
        began = time.monotonic()
        for line in monitor.probe():
            report(line)
        done += 1
        if rounds is None or done < rounds:
            time.sleep(max(0.0, began + every_s - time.monotonic()))


def check_intervals(every_s: float, rounds: int | None) -> None:
    """Raise unless the monitor can run at these intervals.

    Raises:
        InvalidInput: one is not above 0, or `every_s` is not finite.
    """
    if not (math.isfinite(every_s) and every_s > 0):
        raise InvalidInput(f"every_s is {every_s:g}; give seconds above 0.")
    if rounds is not None and rounds < 1:
        raise InvalidInput(f"rounds is {rounds}; give 1 or more.")


def check_port(port: int) -> None:
    """Raise unless a port can be listened on.

    Raises:
        InvalidInput: it is outside 0 to 65535.
    """
    if not 0 <= port <= MAX_PORT:
        raise InvalidInput(f"port is {port}; give 1 to {MAX_PORT}, or 0 for any free port.")


def _in_words(report: dict[str, Any]) -> str:
    if report["healthy"]:
        return f"healthy, {report['latency_ms']:.0f} ms"
    return f"unhealthy: {report.get('error') or 'the probe took {latency_ms} ms'.format(**report)}"


def serve_metrics(monitor: Monitor, host: str, port: int) -> Any:
    """Serve the monitor's metrics on `host:port` in a thread; port 0: any free port.

    Raises:
        InvalidInput: the port is outside 0 to 65535.
        MissingExtra: prometheus-client is not installed.
        HalimedeError: the address cannot be listened on.
    """
    check_port(port)
    prometheus = import_optional("prometheus_client", "metrics")
    registry = prometheus.CollectorRegistry()
    registry.register(monitor)
    try:
        return prometheus.start_http_server(port, host, registry)[0]
    except OSError as error:
        raise HalimedeError(f"{host}:{port} cannot be listened on: {error.strerror}.") from None
