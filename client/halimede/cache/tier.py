"""What a tier is: a place that holds values by key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Item = tuple[bytes, bytes]
"""Key and value."""


class Tier(Protocol):
    """Holds values by key. It may forget any of them, fail or be slow; `GuardedTier` sees to it."""

    @property
    def name(self) -> str:
        """Unique within a cache; the tier's name in `stats()` and in the log."""
        ...

    @property
    def timeout_s(self) -> float | None:
        """Longest wait for one call. None: in this process, answers at once and never fails."""
        ...

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Each key's value, or None."""
        ...

    async def put(self, items: Sequence[Item]) -> None:
        """Hold the values, in place of what was there."""
        ...

    async def clear(self) -> None:
        """Forget every value that halimede stored."""
        ...

    async def close(self) -> None:
        """Release threads and connections; a second call does nothing."""
        ...

    @property
    def size_bytes(self) -> int | None:
        """What is held, or None where only a server knows."""
        ...
