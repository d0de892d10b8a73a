"""A tier that cannot delay or fail a call, whatever happens to its store.

A read that fails or takes longer than the tier's `timeout_s` is a miss and opens a circuit
breaker: the tier is skipped until a background probe succeeds. Writes go through a bounded queue
and have their own breaker, so that a full store is still read. Reads also find queued values;
while writes fail, the queue waits.
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
from halimede.cache.tier import KeyValue, Tier
from halimede.pipeline.breaker import Breaker
from halimede_ops.errors import ServerUnreachable

READ_KEYS = 512
"""Most keys in one read."""
WRITE_VALUES = 128
"""Most values in one write: packing them for Redis blocks the event loop."""
QUEUE_BYTES = 64 * 1024 * 1024
"""Size of the write queue; further values are dropped."""
CLOSE_TIMEOUT_S = 5.0
"""Longest wait of `close` for the write queue, and then for the tier."""
CLEAR_TIMEOUT_S = 60.0
WARNING_EVERY_S = 60.0
"""Least time between two warnings about one tier's reads, or its writes."""
PROBE_KEY = bytes(KEY_BYTES)

log = logging.getLogger("halimede.cache")


@dataclasses.dataclass
class Counts:
    """Counters of a tier; all count keys, except `errors`."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    """Misses whose value was damaged or not ours; the new vector replaces it."""
    skipped: int = 0
    """Keys not looked up because the tier fails."""
    written: int = 0
    unwritten: int = 0
    """Values dropped because the queue was full or the cache was closed while writes failed."""
    errors: int = 0
    """Failed requests."""


class GuardedTier:
    """One tier of a cache, behind a time limit, a bounded write queue and two breakers."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.counts = Counts()
        # The first failure opens a breaker: each failure delays a call by up to `timeout_s`.
        self._read_breaker = Breaker(self._probe_reads, most_failures=1)
        self._write_breaker = Breaker(self._probe_writes, most_failures=1)
        self._queue: dict[bytes, bytes] = {}
        self._queue_bytes = 0
        self._drain_task: asyncio.Task[None] | None = None
        self._last_warning_s = {"reads": -math.inf, "writes": -math.inf}

    @property
    def is_local(self) -> bool:
        """Whether the tier is in this process: it then needs no guard, and its values no check."""
        return self.tier.timeout_s is None

    async def get(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Return each key's intact value, or None."""
        if self.is_local:
            return self._counted(_fresh(await self.tier.get(keys), expect))
        values = _fresh([self._queue.get(key) for key in keys], expect)
        self.counts.hits += len(values) - values.count(None)
        absent = [row for row, value in enumerate(values) if value is None]
        for start in range(0, len(absent), READ_KEYS):
            rows = absent[start : start + READ_KEYS]
            read = await self._read([keys[row] for row in rows], expect)
            for row, value in zip(rows, read, strict=True):
                values[row] = value
        return values

    async def put(self, values: Sequence[KeyValue]) -> None:
        """Store the values: at once in this process, else through the write queue."""
        if self.is_local:
            await self.tier.put(values)
            self.counts.written += len(values)
            return
        for key, value in values:
            self._enqueue(key, value)
        is_idle = self._drain_task is None or self._drain_task.done()
        if is_idle and not self._write_breaker.is_open:
            self._drain_task = asyncio.create_task(self._drain())

    async def flush(self) -> None:
        """Wait until the queue is empty or a write fails."""
        if self._drain_task is not None:
            await asyncio.wait([self._drain_task])

    async def clear(self) -> None:
        """Delete every value, queued ones included.

        Raises:
            Exception: the tier's own error.
        """
        self._dequeue(list(self._queue))
        await self.flush()
        await asyncio.wait_for(self.tier.clear(), CLEAR_TIMEOUT_S)

    async def close(self) -> None:
        """Write the queue, for at most CLOSE_TIMEOUT_S, and release the tier."""
        if self._drain_task is not None:
            await asyncio.wait([self._drain_task], timeout=CLOSE_TIMEOUT_S)
            self._drain_task.cancel()
            await asyncio.wait([self._drain_task])
        await self._read_breaker.close()
        await self._write_breaker.close()
        self.counts.unwritten += len(self._queue)
        self._dequeue(list(self._queue))
        with contextlib.suppress(Exception):  # a store that hangs or fails must not fail close
            await asyncio.wait_for(self.tier.close(), CLOSE_TIMEOUT_S)

    def stats(self) -> dict[str, Any]:
        """The counters, the hit rate of the keys looked up, and the tier's own figures."""
        lookups = self.counts.hits + self.counts.misses
        return {
            **dataclasses.asdict(self.counts),
            "hit_rate": self.counts.hits / lookups if lookups else 0.0,
            **self.tier.stats(),
            "queue_bytes": self._queue_bytes,
            "is_read": not self._read_breaker.is_open,
            "is_written": not self._write_breaker.is_open,
        }

    async def _read(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Each key's intact value in the tier; all None when it fails or is skipped."""
        if self._read_breaker.is_open:
            self.counts.skipped += len(keys)
            return [None] * len(keys)
        try:
            values = await asyncio.wait_for(self.tier.get(keys), self.tier.timeout_s)
        except Exception as error:  # no error of a tier fails the call
            self.counts.skipped += len(keys)
            self._failed("reads", self._read_breaker, error)
            return [None] * len(keys)
        self._read_breaker.succeeded()
        return self._counted(
            [self._intact(key, value, expect) for key, value in zip(keys, values, strict=True)]
        )

    def _intact(self, key: bytes, value: bytes | None, expect: Expect) -> bytes | None:
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

    def _failed(self, operation: str, breaker: Breaker, error: Exception) -> None:
        self.counts.errors += 1
        if time.monotonic() - self._last_warning_s[operation] >= WARNING_EVERY_S:
            self._last_warning_s[operation] = time.monotonic()
            # Not the message: it may contain a path or an address.
            error_name = type(error).__name__
            log.warning(
                "cache tier %s: %s fail (%s); skipping them", self.tier.name, operation, error_name
            )
        breaker.failed()

    async def _probe_reads(self, timeout_s: float) -> None:
        await self._probe("reads", self.tier.get([PROBE_KEY]))

    async def _probe_writes(self, timeout_s: float) -> None:
        await self._probe("writes", self._write_some())
        self._drain_task = asyncio.create_task(self._drain())

    async def _probe(self, operation: str, attempt: Awaitable[object]) -> None:
        """Raise a HalimedeError unless the attempt succeeds in time."""
        try:
            await asyncio.wait_for(attempt, self.tier.timeout_s)
        except Exception as error:
            self.counts.errors += 1
            raise ServerUnreachable(f"cache tier {self.tier.name} fails.") from error
        log.info("cache tier %s: %s work again", self.tier.name, operation)

    def _enqueue(self, key: bytes, value: bytes) -> None:
        if self._queue_bytes + len(value) > QUEUE_BYTES:
            self.counts.unwritten += 1
            return
        self._dequeue([key])
        self._queue[key] = value
        self._queue_bytes += len(value)

    def _dequeue(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._queue_bytes -= len(self._queue.pop(key, b""))

    async def _drain(self) -> None:
        """Write the queue; after a failure the rest waits until writes work again."""
        try:
            while self._queue:
                await asyncio.wait_for(self._write_some(), self.tier.timeout_s)
                self._write_breaker.succeeded()
        except Exception as error:
            self._failed("writes", self._write_breaker, error)

    async def _write_some(self) -> None:
        values = list(itertools.islice(self._queue.items(), WRITE_VALUES))
        await self.tier.put(values)
        self.counts.written += len(values)
        self._dequeue(key for key, _ in values)


def _fresh(values: Sequence[bytes | None], expect: Expect) -> list[bytes | None]:
    """The values that are at most `max_age_s` old; None for the others."""
    if expect.max_age_s is None:
        return list(values)
    return [value if value is not None and is_fresh(value, expect) else None for value in values]
