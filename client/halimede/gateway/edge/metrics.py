"""Metrics: what was asked and answered, for Prometheus."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from halimede.gateway.server import METRICS_FOLDER

CONTENT_TYPE = CONTENT_TYPE_LATEST
LABELS = ("dialect", "model", "key")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the histogram's buckets."""


class Labels(NamedTuple):
    """Who was answered by what. Each value is one of few: `model` is that of a served model."""

    dialect: str
    model: str
    key: str


class Metrics:
    """The metrics of a gateway. Workers share them if METRICS_FOLDER is set."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        prefix, registry = "halimede_gateway", self._registry
        self._requests = Counter(
            f"{prefix}_requests", "Requests answered.", (*LABELS, "status"), registry=registry
        )
        self._seconds = Histogram(
            f"{prefix}_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("dialect", "model", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self._inputs = Counter(
            f"{prefix}_inputs", "Texts, images and documents answered.", LABELS, registry=registry
        )
        self._tokens = Counter(f"{prefix}_tokens", "Tokens answered.", LABELS, registry=registry)
        self._truncated = Counter(
            f"{prefix}_truncated", "Texts that were cut off.", LABELS, registry=registry
        )
        self.in_flight = Gauge(
            f"{prefix}_in_flight",
            "Requests under way.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        # Finding a child by its labels costs more than counting.
        self._counters = functools.lru_cache(4096)(self._counters_of)
        self._outcomes = functools.lru_cache(4096)(self._outcomes_of)

    def count(self, labels: Labels, status: int, seconds: float) -> None:
        """Count an answered request."""
        requests, duration = self._outcomes(labels, f"{status // 100}xx")
        requests.inc()
        duration.observe(seconds)

    def count_inputs(self, labels: Labels, inputs: int, tokens: int, truncated: int) -> None:
        """Count what a request was about."""
        for counter, amount in zip(
            self._counters(labels), (inputs, tokens, truncated), strict=True
        ):
            counter.inc(amount)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format, those of the other workers included."""
        folder = os.environ.get(METRICS_FOLDER)
        if folder is None:
            return generate_latest(self._registry)
        for pid in _dead(Path(folder)):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _counters_of(self, labels: Labels) -> tuple[Counter, Counter, Counter]:
        return (
            self._inputs.labels(*labels),
            self._tokens.labels(*labels),
            self._truncated.labels(*labels),
        )

    def _outcomes_of(self, labels: Labels, status: str) -> tuple[Counter, Histogram]:
        return (
            self._requests.labels(*labels, status),
            self._seconds.labels(labels.dialect, labels.model, status),
        )


def _dead(folder: Path) -> set[int]:
    """Return the processes of a folder's gauges that have ended."""
    found = set()
    for path in folder.glob("gauge_live*_*.db"):
        with contextlib.suppress(ValueError, PermissionError):
            pid = int(path.stem.rpartition("_")[2])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                found.add(pid)
    return found
