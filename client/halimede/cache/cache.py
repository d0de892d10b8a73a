"""The cache: returns each vector from the first tier that has it, or computes it once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from halimede.cache.entries import Entries, Expect, are_finite, check, pack, unpack
from halimede.cache.guarded import GuardedTier
from halimede.cache.tier import KeyValue, Tier
from halimede.pipeline.waiting import Flow, shared_result
from halimede_ops.errors import HalimedeError, InvalidInput

Compute = Callable[[list[int]], Flow[Entries]]
"""Computes the entries of the given rows, in that order."""
Values = dict[bytes, bytes]
"""Packed entries by key."""


class Cache:
    """Tiers, the fastest first. A tier that fails is skipped until it works again.

    A value found in one tier is written to the tiers before it, a computed one to all tiers.
    Tiers outside this process are written in the background. Safe to use from several threads.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        """Take the tiers, the fastest first. Without tiers, equal texts are still computed once.

        Raises:
            InvalidInput: two tiers have the same name.
        """
        names = [tier.name for tier in tiers]
        if len(set(names)) < len(names):
            raise InvalidInput(
                f"the tiers are named {', '.join(names)}. Give each tier its own name."
            )
        self._tiers = [GuardedTier(tier) for tier in tiers]
        self._local = self._tiers[:1] if self._tiers and self._tiers[0].is_local else []
        """The first tier, if it is in this process."""
        self._lock = threading.Lock()
        """Guards the two attributes below, and makes reading the first tier and a claim one step: a
        key is in the first tier, in flight, or claimed."""
        self._flights: dict[bytes, _Flight] = {}
        self._shared = 0

    def get_or_compute(
        self, keys: Sequence[bytes], compute: Compute, expect: Expect
    ) -> Flow[tuple[Entries, np.ndarray]]:
        """Return the entries of the keys, in order, and `[rows]` bool: whether a tier had each.

        `compute` gets one row of each distinct key that no tier has and no other call is
        computing. If that other call fails or gives up, the calls that wait for it compute the
        vectors themselves.

        Raises:
            InvalidInput: `compute` returned entries of another shape.
            Exception: whatever `compute` raised.
        """
        rows: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, row)
        found, computed = yield from self._resolve(keys, _Call(rows, compute, expect))
        values = [found.get(key) or computed[key] for key in keys]
        hits = [key not in computed for key in keys] if computed else np.ones(len(keys))
        return unpack(values, expect), np.array(hits, np.bool_)

    def stats(self) -> dict[str, Any]:
        """Return counters, hit rate and size of each tier by name, and `shared`: the rows that
        another call looked up or computed.
        """
        return {
            "tiers": {guarded.tier.name: guarded.stats() for guarded in self._tiers},
            "shared": self._shared,
        }

    def flush(self) -> None:
        """Wait until every tier has stored what was computed so far, or failed to."""
        for tier in self._tiers:
            tier.flush()

    def clear(self) -> None:
        """Delete every value in every tier.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        failed = []
        for guarded in self._tiers:
            try:
                guarded.clear()
            except Exception:
                failed.append(guarded.tier.name)
        if failed:
            raise HalimedeError(
                f"cache tier {', '.join(failed)} could not be cleared; the others are. "
                "Clear the cache again when the tier works."
            )

    def close(self) -> None:
        """Write the queued values and release the tiers. A second call does nothing."""
        for tier in self._tiers:
            tier.close()

    def _resolve(self, keys: Sequence[bytes], call: _Call) -> Flow[tuple[Values, Values]]:
        """Values found in tiers and values computed, by this call or by other calls in flight."""
        flight = _Flight()
        found, others = self._claim(keys, flight, call.expect)
        try:
            if flight.keys and len(self._tiers) > len(self._local):
                flight.found = yield from self._look_up(list(flight.keys), call.expect)
                found |= flight.found
                flight = self._hand_over(flight)
            flight.computed = yield from self._compute(list(flight.keys), call)
        except Exception:
            flight.failed = True
            raise
        finally:
            self._release(flight)
        if not others:
            return found, flight.computed
        others_found, others_computed = yield from self._share(others, call)
        return found | others_found, flight.computed | others_computed

    def _claim(
        self, keys: Sequence[bytes], flight: _Flight, expect: Expect
    ) -> tuple[Values, dict[bytes, _Flight]]:
        """Return values of the first tier, and the flights of keys that others look up or compute.

        The other keys are this flight's.
        """
        with self._lock:
            found: Values = {}
            for tier in self._local:
                found = _present(keys, tier.get_local(keys, expect))
            others: dict[bytes, _Flight] = {}
            for key in keys:
                if key in found:
                    continue
                other = self._flights.setdefault(key, flight)
                if other is not flight:
                    others[key] = other
                elif key not in flight.keys:
                    flight.keys[key] = None
            return found, others

    def _hand_over(self, flight: _Flight) -> _Flight:
        """End a lookup, and return the flight that computes the keys it has not found."""
        following = _Flight()
        with self._lock:
            for key in flight.keys:
                if key in flight.found:
                    del self._flights[key]
                else:
                    self._flights[key] = following
                    following.keys[key] = None
        flight.done.set_result(None)
        return following

    def _release(self, flight: _Flight) -> None:
        with self._lock:
            for key in flight.keys:
                del self._flights[key]
        flight.done.set_result(None)

    def _share(self, others: dict[bytes, _Flight], call: _Call) -> Flow[tuple[Values, Values]]:
        """Values that other calls found, and values that they computed or left to this call."""
        for flight in set(others.values()):
            yield from shared_result(flight.done)
        found: Values = {}
        computed: Values = {}
        unanswered: list[bytes] = []
        failed: list[bytes] = []
        for key, flight in others.items():
            if key in flight.found:
                found[key] = flight.found[key]
            elif key in flight.computed:
                computed[key] = flight.computed[key]
            else:
                (failed if flight.failed else unanswered).append(key)
        with self._lock:
            self._shared += len(found) + len(computed)
        # Do not wait for another call after one failed: the waits would add up.
        computed |= yield from self._compute(failed, call)
        if unanswered:
            found_later, computed_later = yield from self._resolve(unanswered, call)
            found, computed = found | found_later, computed | computed_later
        return found, computed

    def _look_up(self, keys: Sequence[bytes], expect: Expect) -> Flow[Values]:
        """Values in the tiers after the first, written to the tiers before."""
        found: Values = {}
        for position in range(len(self._local), len(self._tiers)):
            absent = [key for key in keys if key not in found]
            if not absent:
                break
            read = _present(absent, (yield from self._tiers[position].get(absent, expect)))
            found |= read
            self._put(self._tiers[:position], list(read.items()))
        return found

    def _compute(self, keys: list[bytes], call: _Call) -> Flow[Values]:
        """Computed values of the keys, written to every tier; those with NaN or ∞ are not."""
        if not keys:
            return {}
        rows = [call.rows[key] for key in keys]
        entries = check((yield from call.compute(rows)), len(keys), call.expect)
        values = list(zip(keys, pack(keys, entries), strict=True))
        finite = are_finite(entries)
        self._put(self._tiers, [value for value, keep in zip(values, finite, strict=True) if keep])
        return dict(values)

    def _put(self, tiers: Sequence[GuardedTier], values: list[KeyValue]) -> None:
        if values:
            for tier in tiers:
                tier.put(values)


class _Call(NamedTuple):
    """The arguments of one call."""

    rows: dict[bytes, int]
    """One row of each distinct key."""
    compute: Compute
    expect: Expect


class _Flight:
    """Keys that one call looks up or computes, and that other calls can wait for."""

    def __init__(self) -> None:
        self.keys: dict[bytes, None] = {}
        self.done: Future[None] = Future()
        self.failed = False
        """Whether it raised. Otherwise a key without a value means that no tier had it, or that the
        call gave up.
        """
        self.found: Values = {}
        self.computed: Values = {}


def _present(keys: Sequence[bytes], values: Sequence[bytes | None]) -> Values:
    """The values that are not None, by key."""
    return {key: value for key, value in zip(keys, values, strict=True) if value is not None}
