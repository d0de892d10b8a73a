"""A tier with its guards: whatever the tier does, a call gets an answer in time.

Reads that fail or take longer than the tier's `timeout_s` are misses and open a breaker: until a
probe in the background succeeds, the tier is not asked. Writes go through a bounded queue and
have a breaker of their own, so a full store is still read. What is queued is found by reads, and
waits while writes fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from halimede.cache.entries import Expect, is_fresh, is_intact
from halimede.cache.key import KEY_BYTES
from halimede.cache.tier import Item, Tier
from halimede.pipeline.breaker import Breaker
from halimede_ops.errors import ServerUnreachable

READ_KEYS = 512
"""Keys in one request of a tier."""
WRITE_ITEMS = 128
"""Items in one request: what is packed for Redis at once holds up the event loop."""
QUEUE_BYTES = 64 * 1024 * 1024
"""Most bytes of values that wait to be written; what comes beyond is not written."""
FLUSH_S = 5.0
"""Longest wait for the queue at the end."""
CLEAR_S = 60.0
WARNING_EVERY_S = 60.0
"""A tier that fails now and again is one line in this time."""
NOBODYS_KEY = bytes(KEY_BYTES)

log = logging.getLogger("halimede.cache")


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
    """Values not written because the queue was full, or the cache closed while the tier failed."""
    errors: int = 0
    """Failed requests."""


class GuardedTier:
    """One tier of a cache, behind a time limit, a bounded write queue and two breakers."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.counts = Counts()
        # One failure is enough: each of them makes a call wait.
        self._reads = Breaker(self._probe_reads, most_failures=1)
        self._writes = Breaker(self._probe_writes, most_failures=1)
        self._queue: dict[bytes, bytes] = {}
        self._queue_bytes = 0
        self._drain_task: asyncio.Task[None] | None = None
        self._warned_at = {"reads": -math.inf, "writes": -math.inf}

    @property
    def is_local(self) -> bool:
        """Whether the tier is in this process: it needs no guard, and its values no check."""
        return self.tier.timeout_s is None

    async def get(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's intact value, or None."""
        if self.is_local:
            return self._counted(_fresh(await self.tier.get(keys), expect))
        values = _fresh([self._queue.get(key) for key in keys], expect)
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
        if not self._writes.is_open and (self._drain_task is None or self._drain_task.done()):
            self._drain_task = asyncio.create_task(self._drain())

    async def flush(self) -> None:
        """Wait until the queue is written, or a write has failed."""
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
        if self._drain_task is not None:
            await asyncio.wait([self._drain_task], timeout=FLUSH_S)
            self._drain_task.cancel()
            await asyncio.wait([self._drain_task])
        await self._reads.close()
        await self._writes.close()
        self.counts.unwritten += len(self._queue)
        self._forget(list(self._queue))
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
            "is_read": not self._reads.is_open,
            "is_written": not self._writes.is_open,
        }

    async def _ask(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's intact value from the tier; all None when it fails or is skipped."""
        nothing: list[bytes | None] = [None] * len(keys)
        if self._reads.is_open:
            self.counts.skipped += len(keys)
            return nothing
        try:
            values = await asyncio.wait_for(self.tier.get(keys), self.tier.timeout_s)
        except Exception as error:  # whatever a tier raises, the call goes on without it
            self.counts.skipped += len(keys)
            self._failed("reads", self._reads, error)
            return nothing
        self._reads.succeeded()
        return self._counted(
            [self._checked(key, value, expect) for key, value in zip(keys, values, strict=True)]
        )

    def _checked(self, key: bytes, value: bytes | None, expect: Expect) -> bytes | None:
        if value is None:
            return None
        if not is_intact(key, value, expect):
            self.counts.corrupt += 1
            return None
        return value if is_fresh(value, expect) else None

    def _counted(self, values: list[bytes | None]) -> list[bytes | None]:
        misses = values.count(None)
        self.counts.misses += misses
        self.counts.hits += len(values) - misses
        return values

    def _failed(self, what: str, breaker: Breaker, error: Exception) -> None:
        self.counts.errors += 1
        if time.monotonic() - self._warned_at[what] >= WARNING_EVERY_S:
            self._warned_at[what] = time.monotonic()
            # The kind of the error alone: its message may name a path or an address.
            kind = type(error).__name__
            log.warning("cache tier %s: %s fail (%s) and are left out", self.tier.name, what, kind)
        breaker.failed()

    async def _probe_reads(self, timeout_s: float) -> None:
        await self._probe("reads", self.tier.get([NOBODYS_KEY]))

    async def _probe_writes(self, timeout_s: float) -> None:
        await self._probe("writes", self._write_some())
        self._drain_task = asyncio.create_task(self._drain())

    async def _probe(self, what: str, use: Awaitable[object]) -> None:
        """Raise a HalimedeError unless the tier can be used now."""
        try:
            await asyncio.wait_for(use, self.tier.timeout_s)
        except Exception as error:
            self.counts.errors += 1
            raise ServerUnreachable(f"cache tier {self.tier.name} fails.") from error
        log.info("cache tier %s: %s work again", self.tier.name, what)

    def _enqueue(self, key: bytes, value: bytes) -> None:
        if self._queue_bytes + len(value) > QUEUE_BYTES:
            self.counts.unwritten += 1
            return
        self._forget([key])
        self._queue[key] = value
        self._queue_bytes += len(value)

    def _forget(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._queue_bytes -= len(self._queue.pop(key, b""))

    async def _drain(self) -> None:
        """Write the queue; after a failure the rest of it waits until writes work again."""
        try:
            while self._queue:
                await asyncio.wait_for(self._write_some(), self.tier.timeout_s)
                self._writes.succeeded()
        except Exception as error:
            self._failed("writes", self._writes, error)

    async def _write_some(self) -> None:
        items = list(itertools.islice(self._queue.items(), WRITE_ITEMS))
        await self.tier.put(items)
        self.counts.written += len(items)
        self._forget(key for key, _ in items)


def _fresh(values: Sequence[bytes | None], expect: Expect) -> list[bytes | None]:
    """The values of this process that are young enough."""
    if expect.max_age_s is None:
        return list(values)
    return [value if value is not None and is_fresh(value, expect) else None for value in values]
