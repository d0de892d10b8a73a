"""A tier with its guards: whatever the tier does, a call gets an answer in time.

Reads that fail or take longer than the tier's `timeout_s` are misses and open a circuit: until a
probe in the background succeeds, the tier is not asked. Writes go through a bounded queue with
its own circuit, so a full store is still read. What is queued is found by reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from halimede.cache.circuit import Circuit
from halimede.cache.entries import Expect, is_intact
from halimede.cache.key import KEY_BYTES
from halimede.cache.tier import Item, Tier

READ_KEYS = 512
"""Keys in one request of a tier."""
WRITE_ITEMS = 128
"""Items in one request: what is packed for Redis at once holds up the event loop."""
QUEUE_BYTES = 64 * 1024 * 1024
"""Most bytes of values that wait to be written; what comes beyond is not written."""
FLUSH_S = 5.0
"""Longest wait for the queue at the end."""
CLEAR_S = 60.0
PROBE = bytes(KEY_BYTES)


@dataclasses.dataclass
class Counts:
    """What happened in a tier; all count keys, except errors."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    """Misses whose value was truncated, changed or foreign; the new vector takes its place."""
    skipped: int = 0
    """Keys not asked for because the tier fails."""
    written: int = 0
    unwritten: int = 0
    """Values not written because the tier fails or the queue is full."""
    errors: int = 0
    """Failed requests."""


class Lane:
    """One tier of a cache."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.counts = Counts()
        self._reads = Circuit(f"reads of tier {tier.name}")
        self._writes = Circuit(f"writes of tier {tier.name}")
        self._queue: dict[bytes, bytes] = {}
        self._queue_bytes = 0
        self._drain_task: asyncio.Task[None] | None = None
        self._probe_task: asyncio.Task[None] | None = None

    @property
    def is_local(self) -> bool:
        """Whether the tier is in this process: it needs no guard, and its values no check."""
        return self.tier.timeout_s is None

    async def get(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's intact value, or None."""
        if self.is_local:
            return self._counted(list(await self.tier.get(keys)))
        values = [self._queue.get(key) for key in keys]
        self.counts.hits += len(values) - values.count(None)
        absent = [row for row, value in enumerate(values) if value is None]
        for start in range(0, len(absent), READ_KEYS):
            rows = absent[start : start + READ_KEYS]
            found = await self._ask([keys[row] for row in rows], expect)
            for row, value in zip(rows, found, strict=True):
                values[row] = value
        return values

    async def put(self, items: Sequence[Item]) -> None:
        """Hold the values: at once in this process, else soon."""
        if self.is_local:
            await self.tier.put(items)
            self.counts.written += len(items)
            return
        for key, value in items:
            self._enqueue(key, value)
        if self._queue and (self._drain_task is None or self._drain_task.done()):
            self._drain_task = asyncio.create_task(self._drain())

    async def flush(self) -> None:
        """Wait until the queue is written."""
        if self._drain_task is not None:
            await asyncio.wait([self._drain_task])

    async def clear(self) -> None:
        """Forget every value.

        Raises:
            Exception: whatever the tier raised.
        """
        self._forget(list(self._queue))
        await self.flush()
        await asyncio.wait_for(self.tier.clear(), CLEAR_S)

    async def close(self) -> None:
        """Write what is queued, within FLUSH_S, and release the tier."""
        tasks = [task for task in (self._drain_task, self._probe_task) if task is not None]
        if self._drain_task is not None:
            await asyncio.wait([self._drain_task], timeout=FLUSH_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._give_up()
        with contextlib.suppress(Exception):  # it may hang or be broken; nobody needs it any more
            await asyncio.wait_for(self.tier.close(), FLUSH_S)

    def stats(self) -> dict[str, Any]:
        """The counts, the hit rate of the keys asked for, and the bytes held."""
        asked = self.counts.hits + self.counts.misses
        return {
            **dataclasses.asdict(self.counts),
            "hit_rate": self.counts.hits / asked if asked else 0.0,
            "size_bytes": self.tier.size_bytes,
            "queue_bytes": self._queue_bytes,
            "is_read": self._reads.is_closed,
            "is_written": self._writes.is_closed,
        }

    async def _ask(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's intact value from the tier; all None when it fails or is skipped."""
        nothing: list[bytes | None] = [None] * len(keys)
        if not self._reads.is_closed:
            self.counts.skipped += len(keys)
            self._probe_soon()
            return nothing
        try:
            values = await asyncio.wait_for(self.tier.get(keys), self.tier.timeout_s)
        except Exception as error:  # whatever a tier raises, the call goes on without it
            self.counts.errors += 1
            self.counts.skipped += len(keys)
            self._reads.failed(error)
            return nothing
        self._reads.succeeded()
        return self._counted(
            [self._checked(key, value, expect) for key, value in zip(keys, values, strict=True)]
        )

    def _checked(self, key: bytes, value: object, expect: Expect) -> bytes | None:
        if value is None or is_intact(key, value, expect):
            return value  # type: ignore[return-value]
        self.counts.corrupt += 1
        return None

    def _counted(self, values: list[bytes | None]) -> list[bytes | None]:
        misses = values.count(None)
        self.counts.misses += misses
        self.counts.hits += len(values) - misses
        return values

    def _probe_soon(self) -> None:
        """Ask again in the background once the pause is over, so that no call waits for it."""
        if self._reads.may_try and (self._probe_task is None or self._probe_task.done()):
            self._probe_task = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        try:
            await asyncio.wait_for(self.tier.get([PROBE]), self.tier.timeout_s)
        except Exception as error:
            self.counts.errors += 1
            self._reads.failed(error)
        else:
            self._reads.succeeded()

    def _enqueue(self, key: bytes, value: bytes) -> None:
        if not self._writes.may_try or self._queue_bytes + len(value) > QUEUE_BYTES:
            self.counts.unwritten += 1
            return
        self._forget([key])
        self._queue[key] = value
        self._queue_bytes += len(value)

    def _forget(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._queue_bytes -= len(self._queue.pop(key, b""))

    async def _drain(self) -> None:
        """Write the queue; after a failure what is left of it is given up."""
        while self._queue:
            items = list(itertools.islice(self._queue.items(), WRITE_ITEMS))
            try:
                await asyncio.wait_for(self.tier.put(items), self.tier.timeout_s)
            except Exception as error:
                self.counts.errors += 1
                self._writes.failed(error)
                self._give_up()
            else:
                self._writes.succeeded()
                self.counts.written += len(items)
                self._forget(key for key, _ in items)

    def _give_up(self) -> None:
        self.counts.unwritten += len(self._queue)
        self._forget(list(self._queue))
