"""An embedder's statistics as Prometheus metrics: `register(embedder)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede.inputs.content import INPUT_KINDS


def register(embedder: Embedder, registry: Any = None) -> Any:
    """Register and return a collector that reads an embedder's statistics at each scrape.

    `registry.unregister(collector)` ends it. Without a registry it uses Prometheus' default one.

    Raises:
        MissingExtra: prometheus-client is not installed.
    """
    import_optional("prometheus_client", "metrics")
    from prometheus_client import REGISTRY

    collector = _Collector(embedder)
    (registry or REGISTRY).register(collector)
    return collector


class _Collector:
    """A collector in prometheus_client's sense."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def collect(self) -> Iterator[Any]:
        """Yield every metric with its current value."""
        from prometheus_client.core import CounterMetricFamily, SummaryMetricFamily

        stats = self._embedder.stats()
        for name in (
            "calls",
            *(f"{kind}s{cached}" for kind in INPUT_KINDS for cached in ("", "_cached")),
            "fallbacks",
            "model_changes",
        ):
            yield CounterMetricFamily(f"halimede_{name}", f"{name} so far", value=stats[name])
        latency = stats["latency_ms"]
        yield SummaryMetricFamily(
            "halimede_call_seconds",
            "Seconds an answered call took.",
            count_value=latency.get("count", 0),
            sum_value=latency.get("sum", 0.0) / 1000,
        )
        yield _by_provider(stats, "requests", CounterMetricFamily)
        yield _by_provider(stats, "calls_answered", CounterMetricFamily)
        errors = CounterMetricFamily(
            "halimede_request_errors", "Failed requests.", labels=["provider", "error"]
        )
        for provider, figures in stats["providers"].items():
            for error, count in figures["errors"].items():
                errors.add_metric([provider, error], count)
        yield errors
        yield from _cache_metrics(stats.get("cache", {}).get("tiers", {}))


def _by_provider(stats: dict[str, Any], name: str, family: Any) -> Any:
    metric = family(f"halimede_provider_{name}", f"{name} so far", labels=["provider"])
    for provider, figures in stats["providers"].items():
        metric.add_metric([provider], figures[name])
    return metric


def _cache_metrics(tiers: dict[str, dict[str, Any]]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    for name in ("hits", "misses", "hits_hot", "hits_warm", "hits_cold"):
        metric = CounterMetricFamily(f"halimede_cache_{name}", f"{name} so far", labels=["tier"])
        for tier, figures in tiers.items():
            if name in figures:
                metric.add_metric([tier], figures[name])
        yield metric
