"""The cache: each vector from the first tier that has it, else computed once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from halimede.cache.entries import Entries, Expect, check, pack, unpack
from halimede.cache.lane import Lane
from halimede.cache.tier import Item, Tier
from halimede_ops.errors import HalimedeError, InvalidInput

Compute = Callable[[list[int]], Awaitable[Entries]]
"""The entries of the rows it is given, in that order."""


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
        self._lanes = [Lane(tier) for tier in tiers]
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
        found, computed = await self._resolve(rows, compute, expect)
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
            "tiers": {lane.tier.name: lane.stats() for lane in self._lanes},
            "shared": self._shared,
        }

    async def flush(self) -> None:
        """Wait until every tier holds what was computed so far, or has failed to."""
        await asyncio.gather(*(lane.flush() for lane in self._lanes))

    async def clear(self) -> None:
        """Forget every value in every tier.

        Raises:
            HalimedeError: a tier failed; the others are cleared.
        """
        results = await asyncio.gather(
            *(lane.clear() for lane in self._lanes), return_exceptions=True
        )
        failed = [
            lane.tier.name
            for lane, result in zip(self._lanes, results, strict=True)
            if isinstance(result, Exception)
        ]
        if failed:
            raise HalimedeError(
                f"cache tier {', '.join(failed)} could not be cleared; the others are. "
                "Clear again when it works."
            )

    async def close(self) -> None:
        """Write what is queued and release the tiers; a second call does nothing."""
        await asyncio.gather(*(lane.close() for lane in self._lanes))

    async def _recall(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's value from the first tier, if that is in this process: at once."""
        if self._lanes and self._lanes[0].is_local:
            return await self._lanes[0].get(keys, expect)
        return [None] * len(keys)

    async def _resolve(
        self, rows: dict[bytes, int], compute: Compute, expect: Expect
    ) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """Values found in tiers, and values computed here or by calls under way, by key.

        Between `_recall` and taking the keys nothing else runs, so a key is in the first tier, or
        under way, or ours.
        """
        under_way = {key: flight for key in rows if (flight := self._flights.get(key))}
        ours = [key for key in rows if key not in under_way]
        flight = _Flight()
        self._flights.update(dict.fromkeys(ours, flight))
        try:
            flight.values = found = await self._look_up(ours, expect)
            absent = [key for key in ours if key not in found]
            computed = await self._compute(absent, rows, compute, expect)
            flight.values = found | computed
        except Exception:
            flight.failed = True
            raise
        finally:
            for key in ours:
                del self._flights[key]
            flight.done.set()
        return found, computed | await self._share(under_way, rows, compute, expect)

    async def _share(
        self,
        under_way: dict[bytes, _Flight],
        rows: dict[bytes, int],
        compute: Compute,
        expect: Expect,
    ) -> dict[bytes, bytes]:
        """Values of calls under way; computed here where such a call failed or was cancelled."""
        for flight in set(under_way.values()):
            await flight.done.wait()
        shared = {
            key: flight.values[key] for key, flight in under_way.items() if key in flight.values
        }
        self._shared += len(shared)
        absent = [key for key in under_way if key not in shared]
        # Whoever waited for a failed call computes alone: to wait in turn would add up the waits.
        failed = [key for key in absent if under_way[key].failed]
        cancelled = {key: rows[key] for key in absent if not under_way[key].failed}
        computed = await self._compute(failed, rows, compute, expect)
        if cancelled:
            found, anew = await self._resolve(cancelled, compute, expect)
            computed |= found | anew
        return shared | computed

    async def _look_up(self, keys: Sequence[bytes], expect: Expect) -> dict[bytes, bytes]:
        """Values of the tiers that `_recall` did not ask, written to the tiers before."""
        found: dict[bytes, bytes] = {}
        for place, lane in enumerate(self._lanes):
            absent = [key for key in keys if key not in found]
            if not absent or (place == 0 and lane.is_local):
                continue
            values = await lane.get(absent, expect)
            items = [
                (key, value) for key, value in zip(absent, values, strict=True) if value is not None
            ]
            found.update(items)
            await self._put(self._lanes[:place], items)
        return found

    async def _compute(
        self, keys: list[bytes], rows: dict[bytes, int], compute: Compute, expect: Expect
    ) -> dict[bytes, bytes]:
        """Values of the keys, computed and written to every tier; what is not finite is not."""
        if not keys:
            return {}
        entries = check(await compute([rows[key] for key in keys]), len(keys), expect)
        items = list(zip(keys, pack(keys, entries), strict=True))
        finite = np.isfinite(entries.vectors).all(axis=1)
        await self._put(
            self._lanes, [item for item, keep in zip(items, finite, strict=True) if keep]
        )
        return dict(items)

    async def _put(self, lanes: Sequence[Lane], items: list[Item]) -> None:
        if items:
            for lane in lanes:
                await lane.put(items)


class _Flight:
    """One call's keys on their way."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.failed = False
        self.values: dict[bytes, bytes] = {}
        """By key when done; a call that failed or was cancelled has those it found, if any."""
