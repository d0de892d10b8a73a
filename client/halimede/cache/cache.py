"""The cache: returns each vector from the first tier that has it, or computes it once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from halimede.cache.entries import Entries, Expect, check, pack, unpack
from halimede.cache.guarded import GuardedTier
from halimede.cache.tier import KeyValue, Tier
from halimede_ops.errors import HalimedeError, InvalidInput

Compute = Callable[[list[int]], Awaitable[Entries]]
"""Computes the entries of the given rows, in that order."""
Values = dict[bytes, bytes]
"""Packed entries by key."""


class Cache:
    """Tiers, the fastest first. A tier that fails is skipped until it works again.

    A value found in one tier is written to the tiers before it, a computed one to all tiers.
    Tiers outside this process are written in the background.
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
        self._flights: dict[bytes, _Flight] = {}
        self._shared = 0

    async def get_or_compute(
        self, keys: Sequence[bytes], compute: Compute, expect: Expect
    ) -> tuple[Entries, np.ndarray]:
        """Return the entries of the keys, in order, and `[rows]` bool: whether a tier had each.

        `compute` gets one row of each distinct key that no tier has and no other call is
        computing. If that other call fails or is cancelled, the calls that wait for it compute
        the vectors themselves.

        Raises:
            InvalidInput: `compute` returned entries of another shape.
            Exception: whatever `compute` raised.
        """
        local = await self._read_memory(keys, expect)
        rows: dict[bytes, int] = {}
        for row, value in enumerate(local):
            if value is None:
                rows.setdefault(keys[row], row)
        found, computed = await self._resolve(list(rows), _Call(rows, compute, expect))
        values = [
            value or found.get(key) or computed[key] for key, value in zip(keys, local, strict=True)
        ]
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

    async def flush(self) -> None:
        """Wait until every tier has stored what was computed so far, or failed to."""
        await asyncio.gather(*(tier.flush() for tier in self._tiers))

    async def clear(self) -> None:
        """Delete every value in every tier.

        Raises:
            HalimedeError: a tier failed; the others are cleared.
        """
        results = await asyncio.gather(
            *(tier.clear() for tier in self._tiers), return_exceptions=True
        )
        failed = [
            guarded.tier.name
            for guarded, result in zip(self._tiers, results, strict=True)
            if isinstance(result, Exception)
        ]
        if failed:
            raise HalimedeError(
                f"cache tier {', '.join(failed)} could not be cleared; the others are. "
                "Clear the cache again when the tier works."
            )

    async def close(self) -> None:
        """Write the queued values and release the tiers; a second call does nothing."""
        await asyncio.gather(*(tier.close() for tier in self._tiers))

    async def _read_memory(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's value in the first tier, if that is in this process; does not wait."""
        if self._tiers and self._tiers[0].is_local:
            return await self._tiers[0].get(keys, expect)
        return [None] * len(keys)

    async def _resolve(self, keys: Sequence[bytes], call: _Call) -> tuple[Values, Values]:
        """Values found in tiers and values computed, by this call or by other calls in flight.

        Nothing else runs between `_read_memory` and the claim: a key is in the first tier, in
        flight, or claimed here.
        """
        in_flight = {key: flight for key in keys if (flight := self._flights.get(key))}
        ours = [key for key in keys if key not in in_flight]
        with self._claim(ours, is_lookup=True) as flight:
            found = flight.values = await self._look_up(ours, call.expect)
        absent = [key for key in ours if key not in found]
        with self._claim(absent, is_lookup=False) as flight:
            computed = flight.values = await self._compute(absent, call)
        if not in_flight:
            return found, computed
        others_found, others_computed = await self._share(in_flight, call)
        return found | others_found, computed | others_computed

    @contextlib.contextmanager
    def _claim(self, keys: list[bytes], *, is_lookup: bool) -> Iterator[_Flight]:
        """Register the keys as in flight: other calls that need one wait for this one."""
        flight = _Flight(is_lookup)
        self._flights.update(dict.fromkeys(keys, flight))
        try:
            yield flight
        except Exception:
            flight.failed = True
            raise
        finally:
            for key in keys:
                del self._flights[key]
            flight.done.set()

    async def _share(self, in_flight: dict[bytes, _Flight], call: _Call) -> tuple[Values, Values]:
        """Values that other calls found, and values that they computed or left to this call."""
        for flight in set(in_flight.values()):
            await flight.done.wait()
        found: Values = {}
        computed: Values = {}
        unanswered: list[bytes] = []
        failed: list[bytes] = []
        for key, flight in in_flight.items():
            if key in flight.values:
                (found if flight.is_lookup else computed)[key] = flight.values[key]
            else:
                (failed if flight.failed else unanswered).append(key)
        self._shared += len(found) + len(computed)
        # Do not wait for another call after one failed: the waits would add up.
        computed |= await self._compute(failed, call)
        found |= _present(unanswered, await self._read_memory(unanswered, call.expect))
        absent = [key for key in unanswered if key not in found]
        if absent:
            found_later, computed_later = await self._resolve(absent, call)
            found, computed = found | found_later, computed | computed_later
        return found, computed

    async def _look_up(self, keys: Sequence[bytes], expect: Expect) -> Values:
        """Values in the tiers that `_read_memory` did not read, written to the tiers before."""
        found: Values = {}
        for position, tier in enumerate(self._tiers):
            absent = [key for key in keys if key not in found]
            if not absent or (position == 0 and tier.is_local):
                continue
            read = _present(absent, await tier.get(absent, expect))
            found |= read
            await self._put(self._tiers[:position], list(read.items()))
        return found

    async def _compute(self, keys: list[bytes], call: _Call) -> Values:
        """Computed values of the keys, written to every tier; vectors with NaN or ∞ are not."""
        if not keys:
            return {}
        rows = [call.rows[key] for key in keys]
        entries = check(await call.compute(rows), len(keys), call.expect)
        values = list(zip(keys, pack(keys, entries), strict=True))
        finite = np.isfinite(entries.vectors).all(axis=1)
        await self._put(
            self._tiers, [value for value, keep in zip(values, finite, strict=True) if keep]
        )
        return dict(values)

    async def _put(self, tiers: Sequence[GuardedTier], values: list[KeyValue]) -> None:
        if values:
            for tier in tiers:
                await tier.put(values)


class _Call(NamedTuple):
    """The arguments of one call."""

    rows: dict[bytes, int]
    """One row of each distinct key."""
    compute: Compute
    expect: Expect


class _Flight:
    """A lookup or a computation of one call that other calls can wait for."""

    def __init__(self, is_lookup: bool) -> None:
        self.is_lookup = is_lookup
        self.done = asyncio.Event()
        self.failed = False
        """Whether it raised. Otherwise a key without a value means that the call was cancelled,
        or that no tier had the key.
        """
        self.values: Values = {}


def _present(keys: Sequence[bytes], values: Sequence[bytes | None]) -> Values:
    """The values that are not None, by key."""
    return {key: value for key, value in zip(keys, values, strict=True) if value is not None}
