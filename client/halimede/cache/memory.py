"""Values in this process, the least recently used leaving first."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence

from halimede.cache.tier import Item

OVERHEAD_BYTES = 320
"""What Python adds to a value: key, tuple, expiry and table; a test measures it."""


class Memory:
    """Values of at most `max_bytes` together, overhead included."""

    timeout_s = None

    def __init__(self, max_bytes: int, ttl_s: float | None = None, name: str = "memory") -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self._size_bytes = 0
        self._held: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Bytes of all values with their overhead."""
        return self._size_bytes

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Each key's value, or None when it is unknown or older than `ttl_s`."""
        now = time.monotonic()
        held, touch = self._held, self._held.move_to_end
        values: list[bytes | None] = []
        for key in keys:
            found = held.get(key)
            if found is None or found[1] <= now:
                values.append(None)
            else:
                touch(key)
                values.append(found[0])
        return values

    async def put(self, items: Sequence[Item]) -> None:
        """Hold the values; what was used longest ago leaves."""
        expires = math.inf if self.ttl_s is None else time.monotonic() + self.ttl_s
        for key, value in items:
            self._drop(self._held.pop(key, None))
            self._held[key] = (value, expires)
            self._size_bytes += len(value) + OVERHEAD_BYTES
        while self._size_bytes > self.max_bytes:
            self._drop(self._held.popitem(last=False)[1])

    async def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._size_bytes = 0

    async def close(self) -> None:
        """Forget everything."""
        await self.clear()

    def _drop(self, found: tuple[bytes, float] | None) -> None:
        if found is not None:
            self._size_bytes -= len(found[0]) + OVERHEAD_BYTES
