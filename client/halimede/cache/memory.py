"""Values in this process, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from halimede.cache.tier import Item

OVERHEAD_BYTES = 256
"""What Python adds to a value: its key and its place; a test measures it."""


class Memory:
    """Values of at most `max_bytes` together, overhead included."""

    timeout_s = None

    def __init__(self, max_bytes: int, name: str = "memory") -> None:
        self.name = name
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._held: OrderedDict[bytes, bytes] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Bytes of all values with their overhead."""
        return self._size_bytes

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Each key's value, or None."""
        held, touch = self._held, self._held.move_to_end
        values = [held.get(key) for key in keys]
        for key, value in zip(keys, values, strict=True):
            if value is not None:
                touch(key)
        return values

    async def put(self, items: Sequence[Item]) -> None:
        """Hold the values; what was used longest ago leaves."""
        for key, value in items:
            known = self._held.pop(key, None)
            if known is not None:
                self._size_bytes -= len(known) + OVERHEAD_BYTES
            self._held[key] = value
            self._size_bytes += len(value) + OVERHEAD_BYTES
        while self._size_bytes > self._max_bytes:
            self._size_bytes -= len(self._held.popitem(last=False)[1]) + OVERHEAD_BYTES

    async def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._size_bytes = 0

    async def close(self) -> None:
        """Forget everything."""
        await self.clear()
