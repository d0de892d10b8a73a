"""A tier that cannot delay or fail a call, whatever happens to its store.

A read that fails or takes longer than the tier's `timeout_s` is a miss and opens a circuit
breaker: the tier is skipped until a background probe succeeds. Writes go through a bounded queue
and have their own breaker, so that a full store is still read. Reads also find queued values;
while writes fail, the queue waits.

A thread writes the queue. It ends when the queue is empty, and the program does not end before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halimede.cache.entries import Expect, is_fresh, is_intact
from halimede.cache.key import KEY_BYTES
from halimede.cache.tier import KeyValue, Tier
from halimede.pipeline.circuit_breaker import CircuitBreaker
from halimede.pipeline.pool import Pool
from halimede.pipeline.waiting import Flow, result_of

READ_KEYS = 512
"""Most keys in one read."""
READ_MATRICES = 32
"""Most keys in one read of matrices: each may have a megabyte."""
WRITE_VALUES = 128
"""Most values in one write."""
WRITE_BYTES = 4 * 1024 * 1024
"""Size of a write, without its last value."""
CALLS_AT_ONCE = 8
"""Calls of one tier that run at once."""
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
        self._read_breaker = CircuitBreaker(self._probe_reads, max_failures=1)
        self._write_breaker = CircuitBreaker(self._probe_writes, max_failures=1)
        self._pool = Pool(CALLS_AT_ONCE, f"cache-{tier.name}")
        self._changed = threading.Condition()
        """Guards the attributes below, and the counters."""
        self._queue: dict[bytes, bytes] = {}
        self._queue_bytes = 0
        self._is_writing = False
        self._is_closed = False
        self._last_warning_s = {"reads": -math.inf, "writes": -math.inf}

    @property
    def is_local(self) -> bool:
        """Whether the tier is in this process: it then needs no guard, and its values no check."""
        return self.tier.timeout_s is None

    def get_local(self, keys: Sequence[bytes], expect: Expect) -> list[bytes | None]:
        """Return each key's value in a tier of this process, or None."""
        return self._counted(_fresh(self.tier.get(keys), expect))

    def get(self, keys: Sequence[bytes], expect: Expect) -> Flow[list[bytes | None]]:
        """Return each key's intact value, or None."""
        if self.is_local:
            return self.get_local(keys, expect)
        with self._changed:
            queued: list[bytes | None] = [self._queue.get(key) for key in keys]
        values = _fresh(queued, expect)
        absent = [row for row, value in enumerate(values) if value is None]
        with self._changed:
            self.counts.hits += len(values) - len(absent)
        at_once = READ_MATRICES if expect.dims is None else READ_KEYS
        for start in range(0, len(absent), at_once):
            rows = absent[start : start + at_once]
            read = yield from self._read([keys[row] for row in rows], expect)
            for row, value in zip(rows, read, strict=True):
                values[row] = value
        return values

    def put(self, values: Sequence[KeyValue]) -> None:
        """Store the values: at once in this process, else through the write queue."""
        if self.is_local:
            self.tier.put(values)
            with self._changed:
                self.counts.written += len(values)
            return
        with self._changed:
            for key, value in values:
                self._enqueue(key, value)
        self._start_writing()

    def flush(self) -> None:
        """Wait until the queue is empty or a write fails."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_writing)

    def clear(self) -> None:
        """Delete every value, queued ones included.

        Raises:
            Exception: the tier's own error.
        """
        with self._changed:
            self._dequeue(dict(self._queue))
        self.flush()
        self._pool.submit(self.tier.clear).result(CLEAR_TIMEOUT_S)

    def close(self) -> None:
        """Write the queue, for at most CLOSE_TIMEOUT_S, and release the tier."""
        with self._changed:
            if self._is_closed:
                return
            self._changed.wait_for(lambda: not self._is_writing, CLOSE_TIMEOUT_S)
            self._is_closed = True
            self.counts.unwritten += len(self._queue)
            self._dequeue(dict(self._queue))
        self._read_breaker.close()
        self._write_breaker.close()
        with contextlib.suppress(Exception):  # a store that hangs or fails must not fail close
            self._pool.submit(self.tier.close).result(CLOSE_TIMEOUT_S)
        self._pool.close()

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

    def _read(self, keys: Sequence[bytes], expect: Expect) -> Flow[list[bytes | None]]:
        """Each key's intact value in the tier; all None when it fails or is skipped."""
        if self._read_breaker.is_open or self._is_closed:
            return self._skipped(keys)
        try:
            until_s = time.monotonic() + (self.tier.timeout_s or math.inf)
            values = yield from result_of(self._pool.submit(self.tier.get, keys), until_s)
        except Exception as error:  # no error of a tier fails the call
            self._failed("reads", self._read_breaker, error)
            return self._skipped(keys)
        self._read_breaker.record_success()
        return self._counted(
            [self._intact(key, value, expect) for key, value in zip(keys, values, strict=True)]
        )

    def _skipped(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._changed:
            self.counts.skipped += len(keys)
        return [None] * len(keys)

    def _intact(self, key: bytes, value: bytes | None, expect: Expect) -> bytes | None:
        if value is None:
            return None
        if not is_intact(key, value, expect):
            with self._changed:
                self.counts.corrupt += 1
            return None
        return value if is_fresh(value, expect) else None

    def _counted(self, values: list[bytes | None]) -> list[bytes | None]:
        misses = values.count(None)
        with self._changed:
            self.counts.misses += misses
            self.counts.hits += len(values) - misses
        return values

    def _failed(self, operation: str, breaker: CircuitBreaker, error: Exception) -> None:
        with self._changed:
            self.counts.errors += 1
        if time.monotonic() - self._last_warning_s[operation] >= WARNING_EVERY_S:
            self._last_warning_s[operation] = time.monotonic()
            # Not the message: it may contain a path or an address.
            error_name = type(error).__name__
            log.warning(
                "cache tier %s: %s fail (%s); skipping them", self.tier.name, operation, error_name
            )
        breaker.record_failure()

    def _probe_reads(self, timeout_s: float) -> None:
        self._probe("reads", lambda: self.tier.get([PROBE_KEY]))

    def _probe_writes(self, timeout_s: float) -> None:
        self._probe("writes", self._write_some)
        self._write_breaker.record_success()
        self._start_writing()

    def _probe(self, operation: str, attempt: Callable[[], object]) -> None:
        """Raise unless the attempt succeeds in time."""
        try:
            self._pool.submit(attempt).result(self.tier.timeout_s)
        except Exception:
            with self._changed:
                self.counts.errors += 1
            raise
        log.info("cache tier %s: %s work again", self.tier.name, operation)

    def _enqueue(self, key: bytes, value: bytes) -> None:
        if self._is_closed or self._queue_bytes + len(value) > QUEUE_BYTES:
            self.counts.unwritten += 1
            return
        self._queue_bytes += len(value) - len(self._queue.pop(key, b""))
        self._queue[key] = value

    def _dequeue(self, values: Mapping[bytes, bytes]) -> None:
        """Remove these values, unless newer ones of their keys are queued."""
        for key, value in values.items():
            if self._queue.get(key) is value:
                self._queue_bytes -= len(self._queue.pop(key))

    def _start_writing(self) -> None:
        """Write the queue in a thread, unless one does so already or writes fail."""
        with self._changed:
            if self._is_writing or self._is_closed or self._write_breaker.is_open:
                return
            self._is_writing = True
        # Not a daemon: the interpreter waits for it, so that nothing is lost when a program ends.
        # After that, and where no thread can start, the caller's thread writes.
        if threading.main_thread().is_alive():
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._write, name="halimede-write").start()
                return
        self._write()

    def _write(self) -> None:
        """Write the queue. After a failure the rest waits until writes work again."""
        until_s = math.inf
        while self._goes_on_writing(until_s):
            if until_s == math.inf and not threading.main_thread().is_alive():
                until_s = time.monotonic() + CLOSE_TIMEOUT_S
            try:
                self._pool.submit(self._write_some).result(self.tier.timeout_s)
            except Exception as error:
                self._failed("writes", self._write_breaker, error)
                until_s = -math.inf
            else:
                self._write_breaker.record_success()

    def _goes_on_writing(self, until_s: float) -> bool:
        """Whether there is more to write and time. If not, `put` starts the next thread."""
        with self._changed:
            self._is_writing = bool(self._queue) and time.monotonic() < until_s
            if not self._is_writing:
                self._changed.notify_all()
            return self._is_writing

    def _write_some(self) -> None:
        values: dict[bytes, bytes] = {}
        size_bytes = 0
        with self._changed:
            for key, value in itertools.islice(self._queue.items(), WRITE_VALUES):
                values[key] = value
                size_bytes += len(value)
                if size_bytes >= WRITE_BYTES:
                    break
        self.tier.put(list(values.items()))
        with self._changed:
            self.counts.written += len(values)
            self._dequeue(values)


def _fresh(values: Sequence[bytes | None], expect: Expect) -> list[bytes | None]:
    """The values that are at most `max_age_s` old; None for the others."""
    if expect.max_age_s is None:
        return list(values)
    return [value if value is not None and is_fresh(value, expect) else None for value in values]
