"""One reading shared by all who asked before it began."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """A value read anew for each that asks, with as few readings as that allows.

    Who asks while a reading is under way waits for the next one: what is returned was read
    entirely after it was asked for.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T]]) -> None:
        self._fetch = fetch
        self._current: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def read(self) -> T:
        """The value as it is after this call."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._after(self._current))
            self._next.add_done_callback(_seen)
        # Who gives up must not take the reading away from the others.
        return await asyncio.shield(self._next)

    async def _after(self, current: asyncio.Task[T] | None) -> T:
        if current is not None:
            await asyncio.wait({current})
        self._current, self._next = self._next, None
        return await self._fetch()


def _seen(task: asyncio.Task[T]) -> None:
    """Mark a failure as seen, also when everybody who asked gave up."""
    if not task.cancelled():
        task.exception()
