"""An embedder's statistics as Prometheus metrics: `register(embedder)`, then serve as usual."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede.inputs.content import INPUT_KINDS


def register(embedder: Embedder, registry: Any = None) -> Any:
    """The collector that reads an embedder's statistics at each scrape, already registered.

    `registry.unregister(collector)` ends it; without a registry, Prometheus' own is taken.

    Raises:
        MissingExtra: prometheus-client is not installed.
    """
    import_optional("prometheus_client", "metrics")
    from prometheus_client import REGISTRY

    collector = _Collector(embedder)
    (registry or REGISTRY).register(collector)
    return collector


class _Collector:
    """What Prometheus asks for metrics."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def collect(self) -> Iterator[Any]:
        """Every metric as it is now."""
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
        for provider, counts in stats["providers"].items():
            for error, count in counts["errors"].items():
                errors.add_metric([provider, error], count)
        yield errors
        yield from _of_cache(stats.get("cache", {}).get("tiers", {}))


def _by_provider(stats: dict[str, Any], name: str, family: Any) -> Any:
    metric = family(f"halimede_provider_{name}", f"{name} so far", labels=["provider"])
    for provider, counts in stats["providers"].items():
        metric.add_metric([provider], counts[name])
    return metric


def _of_cache(tiers: dict[str, dict[str, Any]]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    for name in ("hits", "misses"):
        metric = CounterMetricFamily(f"halimede_cache_{name}", f"{name} so far", labels=["tier"])
        for tier, counts in tiers.items():
            metric.add_metric([tier], counts.get(name, 0))
        yield metric
