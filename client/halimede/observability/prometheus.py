"""The statistics of embedders as Prometheus metrics: `register(embedder)`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from halimede.embedder import BaseClient
from halimede.extras import import_optional
from halimede.inputs.content import INPUT_KINDS
from halimede_ops.errors import InvalidInput

COUNTERS = (
    "calls",
    *(f"{kind}s{cached}" for kind in INPUT_KINDS for cached in ("", "_cached")),
    "fallbacks",
    "model_changes",
)
TIER_COUNTERS = ("hits", "misses", "hits_hot", "hits_warm", "hits_cold")


def register(
    embedder: BaseClient, registry: Any = None, *, name: str | None = None
) -> Registration:
    """Report the statistics of an embedder, a reranker or a classifier at each scrape.

    `Registration.unregister` ends it.

    Args:
        embedder: the embedder, reranker or classifier. Several can be registered.
        registry: Prometheus' registry. Default: its default one.
        name: value of the label `embedder`. Default: the default model's name; further embedders
            of it get `-2`, `-3` and so on.

    Raises:
        InvalidInput: another embedder has this name.
        MissingExtra: prometheus-client is not installed.
    """
    registry = registry or import_optional("prometheus_client", "metrics").REGISTRY
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = _collectors[registry] = _Collector()
            registry.register(collector)
        return Registration(collector, embedder, collector.add(embedder, name))


class Registration:
    """An embedder that is registered."""

    def __init__(self, collector: _Collector, embedder: BaseClient, name: str) -> None:
        self._collector = collector
        self._embedder = embedder
        self.name = name
        """Value of its label `embedder`."""

    def unregister(self) -> None:
        """Report the embedder no more. A second call does nothing."""
        with _lock:
            if self._collector.embedders.get(self.name) is self._embedder:
                del self._collector.embedders[self.name]


class _Collector:
    """A collector in prometheus_client's sense, of all embedders of one registry."""

    def __init__(self) -> None:
        self.embedders: dict[str, BaseClient] = {}

    def add(self, embedder: BaseClient, name: str | None) -> str:
        if name is not None and name in self.embedders:
            raise InvalidInput(f"an embedder is registered as {name!r}. Give another name.")
        base = chosen = name or embedder.config.default_model
        number = 1
        while chosen in self.embedders:
            number += 1
            chosen = f"{base}-{number}"
        self.embedders[chosen] = embedder
        return chosen

    def collect(self) -> Iterator[Any]:
        """Yield every metric with its current values."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        stats = {name: one.current_stats() for name, one in list(self.embedders.items())}
        for counter in COUNTERS:
            metric = CounterMetricFamily(
                f"halimede_{counter}", f"{counter} so far", labels=["embedder"]
            )
            for name, figures in stats.items():
                metric.add_metric([name], figures[counter])
            yield metric
        seconds = HistogramMetricFamily(
            "halimede_call_seconds", "Seconds an answered call took.", labels=["embedder"]
        )
        for name, figures in stats.items():
            latency = figures["latency_ms"]
            buckets = list(latency.get("buckets", {"+Inf": 0}).items())
            seconds.add_metric([name], buckets, latency.get("sum", 0.0) / 1000)
        yield seconds
        yield from _provider_metrics(stats)
        yield from _cache_metrics(stats)


def _provider_metrics(stats: Mapping[str, Any]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    labels = ["embedder", "provider"]
    for counter in ("requests", "calls_answered"):
        metric = CounterMetricFamily(
            f"halimede_provider_{counter}", f"{counter} so far", labels=labels
        )
        for name, figures in stats.items():
            for provider, counts in figures["providers"].items():
                metric.add_metric([name, provider], counts[counter])
        yield metric
    errors = CounterMetricFamily(
        "halimede_request_errors", "Failed requests.", labels=[*labels, "error"]
    )
    for name, figures in stats.items():
        for provider, counts in figures["providers"].items():
            for error, count in counts["errors"].items():
                errors.add_metric([name, provider, error], count)
    yield errors


def _cache_metrics(stats: Mapping[str, Any]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    for counter in TIER_COUNTERS:
        metric = CounterMetricFamily(
            f"halimede_cache_{counter}", f"{counter} so far", labels=["embedder", "tier"]
        )
        for name, figures in stats.items():
            for tier, counts in figures["cache"].get("tiers", {}).items():
                if counter in counts:
                    metric.add_metric([name, tier], counts[counter])
        yield metric


_lock = threading.Lock()
_collectors: weakref.WeakKeyDictionary[Any, _Collector] = weakref.WeakKeyDictionary()
"""The collector of each registry."""
