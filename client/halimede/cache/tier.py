"""The interface of a cache tier: a store of values by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

KeyValue = tuple[bytes, bytes]
"""A key and its value."""


class Tier(Protocol):
    """Stores values by key. It may lose a value, fail or be slow: `GuardedTier` handles that.

    Its methods block, and are called from several threads.
    """

    @property
    def name(self) -> str:
        """Name in `stats()` and in the log, unique within a cache."""
        ...

    @property
    def timeout_s(self) -> float | None:
        """Longest wait for one call. None: the tier is in this process and never waits or fails."""
        ...

    def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Return each key's value, or None."""
        ...

    def put(self, values: Sequence[KeyValue]) -> None:
        """Store the values; a value replaces the earlier one of its key."""
        ...

    def clear(self) -> None:
        """Delete every value that halimede stored."""
        ...

    def close(self) -> None:
        """Release threads and connections; a second call does nothing."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Figures that only the tier knows: `size_bytes`, None where the store does not say."""
        ...
