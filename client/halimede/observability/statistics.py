"""Statistics of an embedder: counts and latencies, never a text."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import Counter, deque
from typing import Any

import numpy as np

from halimede.inputs.content import INPUT_KINDS, InputKind

LATENCY_WINDOW = 10_000
"""Number of latest calls over which mean and percentiles are computed."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of latencies, in seconds."""


class Statistics:
    """Counters of one embedder. Safe to use from several threads."""

    def __init__(self) -> None:
        self.calls = 0
        self.fallbacks = 0
        self.model_changes = 0
        self.errors: Counter[str] = Counter()
        self.item_errors: Counter[str] = Counter()
        self._items: Counter[InputKind] = Counter()
        self._cached: Counter[InputKind] = Counter()
        self._requests: Counter[str] = Counter()
        self._sent: Counter[tuple[str, InputKind]] = Counter()
        self._answered: Counter[str] = Counter()
        self._failures: dict[str, Counter[str]] = {}
        self._latencies_s: deque[float] = deque(maxlen=LATENCY_WINDOW)
        self._latency_sum_s = 0.0
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        """Answered calls by latency: at most each of BUCKETS_S and more than the one before."""
        self._lock = threading.Lock()

    def requested(self, provider: str, kind: InputKind, items: int) -> None:
        """Count a request with this many items."""
        with self._lock:
            self._requests[provider] += 1
            self._sent[provider, kind] += items

    def failed(self, provider: str, error: str) -> None:
        """Count a request that ended in an error of this class."""
        with self._lock:
            self._failures.setdefault(provider, Counter())[error] += 1

    def model_changed(self, provider: str) -> None:
        """Count that a provider serves another model under the same name."""
        with self._lock:
            self.model_changes += 1

    def answered(
        self,
        provider: str,
        kind: InputKind,
        items: int,
        cached: int,
        latency_s: float,
        fallback: bool,
    ) -> None:
        """Count an answered call."""
        with self._lock:
            self.calls += 1
            self._items[kind] += items
            self._cached[kind] += cached
            self.fallbacks += fallback
            self._answered[provider] += 1
            self._latencies_s.append(latency_s)
            self._latency_sum_s += latency_s
            self._buckets[bisect.bisect_left(BUCKETS_S, latency_s)] += 1

    def left_out(self, error: str) -> None:
        """Count an item of an answered call that ended in an error of this class."""
        with self._lock:
            self.item_errors[error] += 1

    def gave_up(self, error: str) -> None:
        """Count a call that ended in an error of this class."""
        with self._lock:
            self.calls += 1
            self.errors[error] += 1

    def summary(self) -> dict[str, Any]:
        """Return all figures, as JSON types; latencies in milliseconds.

        Mean and percentiles cover the latest calls; sum, count and buckets all answered calls. A
        bucket counts the calls that took at most so many seconds.
        """
        with self._lock:
            names = sorted({*self._requests, *self._answered, *self._failures})
            return {
                "calls": self.calls,
                **{f"{kind}s": self._items[kind] for kind in INPUT_KINDS},
                **{f"{kind}s_cached": self._cached[kind] for kind in INPUT_KINDS},
                "fallbacks": self.fallbacks,
                "model_changes": self.model_changes,
                "errors": dict(self.errors),
                "item_errors": dict(self.item_errors),
                "latency_ms": self._latency_ms(),
                "providers": {
                    name: {
                        "requests": self._requests[name],
                        **{f"{kind}s": self._sent[name, kind] for kind in INPUT_KINDS},
                        "calls_answered": self._answered[name],
                        "errors": dict(self._failures.get(name, {})),
                    }
                    for name in names
                },
            }

    def _latency_ms(self) -> dict[str, Any]:
        if not self._latencies_s:
            return {}
        values = 1000 * np.array(self._latencies_s)
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        figures = {"mean": values.mean(), "p50": p50, "p95": p95, "p99": p99}
        figures["sum"] = 1000 * self._latency_sum_s
        rounded = {name: round(float(value), 3) for name, value in figures.items()}
        bounds = [f"{bound:g}" for bound in BUCKETS_S] + ["+Inf"]
        buckets = dict(zip(bounds, itertools.accumulate(self._buckets), strict=True))
        return {**rounded, "count": sum(self._answered.values()), "buckets": buckets}
