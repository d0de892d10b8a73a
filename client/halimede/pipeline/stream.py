"""A stream of items as calls under way: cut, sent ahead by a few, handed out in order."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

from halimede.inputs.content import Input
from halimede.observability.progress import Advance
from halimede.pipeline.requests import WINDOWS_IN_FLIGHT, Windows
from halimede.results import Embeddings
from halimede_ops.errors import SpaceRefused

Future = concurrent.futures.Future[Embeddings]


class Stream:
    """The parts of one stream."""

    def __init__(self, window: int, encode: Callable[[Any, int], Input]) -> None:
        """A stream of parts of `window` items; `encode` gives what a call takes for each."""
        self._windows = Windows(window)
        self._encode = encode
        self._items = 0
        self._under_way: deque[Future] = deque()
        self._space: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether a part should be handed out before more is sent."""
        return len(self._under_way) > WINDOWS_IN_FLIGHT

    @property
    def is_under_way(self) -> bool:
        """Whether a part was sent and not handed out."""
        return bool(self._under_way)

    def cut(self, items: Iterable[Any]) -> Iterator[list[Input]]:
        """The stream in parts."""
        for item in items:
            if (part := self._add(item)) is not None:
                yield part
        if part := self._windows.rest():
            yield part

    async def cut_async(
        self, items: Iterable[Any] | AsyncIterable[Any]
    ) -> AsyncIterator[list[Input]]:
        """The stream in parts, of a stream of either kind."""
        if not isinstance(items, AsyncIterable):
            for part in self.cut(items):
                yield part
            return
        async for item in items:
            if (filled := self._add(item)) is not None:
                yield filled
        if rest := self._windows.rest():
            yield rest

    def first(self, part: Sequence[Input]) -> int:
        """Which item of the stream the part just cut begins with."""
        return self._items - len(part)

    def send(self, part: Future) -> None:
        """A part is under way."""
        self._under_way.append(part)

    def next(self) -> Future:
        """The part to hand out next; it stays under way until `checked`."""
        return self._under_way[0]

    def checked(self, part: Embeddings, advance: Advance) -> Embeddings:
        """The part, handed out.

        Raises:
            SpaceRefused: its space is not that of the parts before.
        """
        self._under_way.popleft()
        if self._space not in (None, part.space):
            raise SpaceRefused(
                f"the stream began in space {self._space}; {part.model} now has {part.space}. "
                "Begin it again."
            )
        self._space = part.space
        advance(len(part) + len(part.errors))
        return part

    def close(self) -> None:
        """Cancel what is under way."""
        for part in self._under_way:
            part.cancel()

    def _add(self, item: Any) -> list[Input] | None:
        part = self._windows.add(self._encode(item, self._items))
        self._items += 1
        return part
