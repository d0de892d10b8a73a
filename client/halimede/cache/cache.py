"""The cache: each vector from the first tier that has it, else computed once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from halimede.cache.entries import Entries, Expect, check, pack, unpack
from halimede.cache.guarded import GuardedTier
from halimede.cache.tier import Item, Tier
from halimede_ops.errors import HalimedeError, InvalidInput

Compute = Callable[[list[int]], Awaitable[Entries]]
"""The entries of the rows it is given, in that order."""
Values = dict[bytes, bytes]
"""Packed entries by key."""


class Cache:
    """Tiers, the fastest first. A tier that fails is left out for a while, never an outage.

    Found in one tier, a value is written to those before it; computed, to all of them. Tiers
    outside this process are written in the background.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        """Take the tiers, the fastest first; none at all still computes equal texts once.

        Raises:
            InvalidInput: two tiers have one name.
        """
        names = [tier.name for tier in tiers]
        if len(set(names)) < len(names):
            raise InvalidInput(f"tiers are named {', '.join(names)}. Give each its own name.")
        self._tiers = [GuardedTier(tier) for tier in tiers]
        self._flights: dict[bytes, _Flight] = {}
        self._shared = 0

    async def get_or_compute(
        self, keys: Sequence[bytes], compute: Compute, expect: Expect
    ) -> tuple[Entries, np.ndarray]:
        """The entries of the keys in their order, and `[rows]` bool: whether a tier had it.

        `compute` is given one row of each distinct key that neither a tier nor a call under way
        has. When the call under way fails or is cancelled, those that wait for it compute for
        themselves.

        Raises:
            InvalidInput: `compute` gave entries of another shape.
            Exception: whatever `compute` raised.
        """
        recalled = await self._recall(keys, expect)
        rows: dict[bytes, int] = {}
        for row, value in enumerate(recalled):
            if value is None:
                rows.setdefault(keys[row], row)
        found, computed = await self._resolve(list(rows), _Call(rows, compute, expect))
        values = [
            value or found.get(key) or computed[key]
            for key, value in zip(keys, recalled, strict=True)
        ]
        hits = [key not in computed for key in keys] if computed else np.ones(len(keys))
        return unpack(values, expect), np.array(hits, np.bool_)

    def stats(self) -> dict[str, Any]:
        """Counts, hit rate and size of each tier by its name; `shared` rows waited for another
        call's computation instead of their own.
        """
        return {
            "tiers": {guarded.tier.name: guarded.stats() for guarded in self._tiers},
            "shared": self._shared,
        }

    async def flush(self) -> None:
        """Wait until every tier holds what was computed so far, or has failed to."""
        await asyncio.gather(*(tier.flush() for tier in self._tiers))

    async def clear(self) -> None:
        """Forget every value in every tier.

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
                "Clear again when it works."
            )

    async def close(self) -> None:
        """Write what is queued and release the tiers; a second call does nothing."""
        await asyncio.gather(*(tier.close() for tier in self._tiers))

    async def _recall(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's value from the first tier, if that is in this process: at once."""
        if self._tiers and self._tiers[0].is_local:
            return await self._tiers[0].get(keys, expect)
        return [None] * len(keys)

    async def _resolve(self, keys: Sequence[bytes], call: _Call) -> tuple[Values, Values]:
        """Values found in tiers, and values computed, by this call or by others under way.

        Between `_recall` and the claim nothing else runs: a key is in the first tier, or under
        way, or becomes ours.
        """
        under_way = {key: flight for key in keys if (flight := self._flights.get(key))}
        ours = [key for key in keys if key not in under_way]
        with self._claim(ours, is_lookup=True) as flight:
            found = flight.values = await self._look_up(ours, call.expect)
        absent = [key for key in ours if key not in found]
        with self._claim(absent, is_lookup=False) as flight:
            computed = flight.values = await self._compute(absent, call)
        if not under_way:
            return found, computed
        others_found, others_computed = await self._share(under_way, call)
        return found | others_found, computed | others_computed

    @contextlib.contextmanager
    def _claim(self, keys: list[bytes], *, is_lookup: bool) -> Iterator[_Flight]:
        """A flight that other calls wait for when they need one of the keys."""
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

    async def _share(self, under_way: dict[bytes, _Flight], call: _Call) -> tuple[Values, Values]:
        """Values that other calls found, and those they computed or left to be computed here."""
        for flight in set(under_way.values()):
            await flight.done.wait()
        found: Values = {}
        computed: Values = {}
        again: list[bytes] = []
        alone: list[bytes] = []
        for key, flight in under_way.items():
            if key in flight.values:
                (found if flight.is_lookup else computed)[key] = flight.values[key]
            else:
                (alone if flight.failed else again).append(key)
        self._shared += len(found) + len(computed)
        # To wait for a second call after one failed, and for a third, would add up their waits.
        computed |= await self._compute(alone, call)
        found |= _present(again, await self._recall(again, call.expect))
        again = [key for key in again if key not in found]
        if again:
            found_again, computed_again = await self._resolve(again, call)
            found, computed = found | found_again, computed | computed_again
        return found, computed

    async def _look_up(self, keys: Sequence[bytes], expect: Expect) -> Values:
        """Values of the tiers that `_recall` did not ask, written to the tiers before."""
        found: Values = {}
        for place, tier in enumerate(self._tiers):
            absent = [key for key in keys if key not in found]
            if not absent or (place == 0 and tier.is_local):
                continue
            here = _present(absent, await tier.get(absent, expect))
            found |= here
            await self._put(self._tiers[:place], list(here.items()))
        return found

    async def _compute(self, keys: list[bytes], call: _Call) -> Values:
        """Values of the keys, computed and written to every tier; what is not finite is not."""
        if not keys:
            return {}
        rows = [call.rows[key] for key in keys]
        entries = check(await call.compute(rows), len(keys), call.expect)
        items = list(zip(keys, pack(keys, entries), strict=True))
        finite = np.isfinite(entries.vectors).all(axis=1)
        await self._put(
            self._tiers, [item for item, keep in zip(items, finite, strict=True) if keep]
        )
        return dict(items)

    async def _put(self, tiers: Sequence[GuardedTier], items: list[Item]) -> None:
        if items:
            for tier in tiers:
                await tier.put(items)


class _Call(NamedTuple):
    """What one call was given."""

    rows: dict[bytes, int]
    """One row of each key."""
    compute: Compute
    expect: Expect


class _Flight:
    """One call's keys on their way, first to be looked up, then to be computed."""

    def __init__(self, is_lookup: bool) -> None:
        self.is_lookup = is_lookup
        self.done = asyncio.Event()
        self.failed = False
        """Whether it raised; neither that nor a value: it was cancelled, or no tier had the key."""
        self.values: Values = {}


def _present(keys: Sequence[bytes], values: Sequence[bytes | None]) -> Values:
    """The values that are there, by key."""
    return {key: value for key, value in zip(keys, values, strict=True) if value is not None}
