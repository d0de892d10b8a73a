"""Values in this process; the least recently used is evicted first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from halimede.cache.tier import KeyValue

OVERHEAD_BYTES = 256
"""Memory that Python needs for one value beside its bytes: the key and the dict's entry. A test
measures it."""


class Memory:
    """Stores at most `max_bytes` of values, overhead included."""

    timeout_s = None

    def __init__(self, max_bytes: int, name: str = "memory") -> None:
        self.name = name
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of all values with their overhead."""
        return self._size_bytes

    def stats(self) -> Mapping[str, int]:
        """The size."""
        return {"size_bytes": self._size_bytes}

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return each key's value, or None."""
        mark_used = self._values.move_to_end
        with self._lock:
            values = [self._values.get(key) for key in keys]
            for key, value in zip(keys, values, strict=True):
                if value is not None:
                    mark_used(key)
        return values

    def put(self, values: Sequence[KeyValue]) -> None:
        """Store the values and evict the least recently used beyond `max_bytes`.

        A value larger than that is not stored.
        """
        with self._lock:
            for key, value in values:
                replaced = self._values.pop(key, None)
                if replaced is not None:
                    self._size_bytes -= len(replaced) + OVERHEAD_BYTES
                if len(value) + OVERHEAD_BYTES > self._max_bytes:
                    continue
                self._values[key] = value
                self._size_bytes += len(value) + OVERHEAD_BYTES
            while self._size_bytes > self._max_bytes:
                self._size_bytes -= len(self._values.popitem(last=False)[1]) + OVERHEAD_BYTES

    def clear(self) -> None:
        """Delete every value."""
        with self._lock:
            self._values.clear()
            self._size_bytes = 0

    def close(self) -> None:
        """Delete every value."""
        self.clear()
