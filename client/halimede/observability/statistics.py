"""Statistics of an embedder: counts and latencies, never a text."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np

from halimede.inputs.content import INPUT_KINDS, InputKind

LATENCY_WINDOW = 10_000
"""Number of latest calls over which mean and percentiles are computed."""


class Statistics:
    """Counters of one embedder. Not thread-safe: used only on the client's event loop."""

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

    def requested(self, provider: str, kind: InputKind, items: int) -> None:
        """Count a request with this many items."""
        self._requests[provider] += 1
        self._sent[provider, kind] += items

    def failed(self, provider: str, error: str) -> None:
        """Count a request that ended in an error of this class."""
        self._failures.setdefault(provider, Counter())[error] += 1

    def model_changed(self, provider: str) -> None:
        """Count that a provider serves another model under the same name."""
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
        self.calls += 1
        self._items[kind] += items
        self._cached[kind] += cached
        self.fallbacks += fallback
        self._answered[provider] += 1
        self._latencies_s.append(latency_s)
        self._latency_sum_s += latency_s

    def left_out(self, error: str) -> None:
        """Count an item of an answered call that ended in an error of this class."""
        self.item_errors[error] += 1

    def gave_up(self, error: str) -> None:
        """Count a call that ended in an error of this class."""
        self.calls += 1
        self.errors[error] += 1

    def summary(self) -> dict[str, Any]:
        """Return all figures, as JSON types; latencies in milliseconds.

        Mean and percentiles cover the latest calls, sum and count all answered calls.
        """
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

    def _latency_ms(self) -> dict[str, float]:
        if not self._latencies_s:
            return {}
        values = 1000 * np.array(self._latencies_s)
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        figures = {"mean": values.mean(), "p50": p50, "p95": p95, "p99": p99}
        figures["sum"] = 1000 * self._latency_sum_s
        rounded = {name: round(float(value), 3) for name, value in figures.items()}
        return {**rounded, "count": sum(self._answered.values())}
