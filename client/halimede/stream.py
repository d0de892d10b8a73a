"""A stream of texts as calls under way: cut, sent ahead by a few, handed out in order."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

from halimede.progress import Advance
from halimede.requests import WINDOWS_IN_FLIGHT, Windows
from halimede.results import Embeddings
from halimede_ops.errors import SpaceRefused

Future = concurrent.futures.Future[Embeddings]


class Stream:
    """The parts of one stream."""

    def __init__(self, window: int) -> None:
        self._windows = Windows(window)
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

    def cut(self, texts: Iterable[str]) -> Iterator[list[bytes]]:
        """The stream in parts."""
        for text in texts:
            if (part := self._windows.add(text)) is not None:
                yield part
        if part := self._windows.rest():
            yield part

    async def cut_async(
        self, texts: Iterable[str] | AsyncIterable[str]
    ) -> AsyncIterator[list[bytes]]:
        """The stream in parts, of a stream of either kind."""
        if not isinstance(texts, AsyncIterable):
            for part in self.cut(texts):
                yield part
            return
        async for text in texts:
            if (filled := self._windows.add(text)) is not None:
                yield filled
        if rest := self._windows.rest():
            yield rest

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
        advance(len(part))
        return part

    def close(self) -> None:
        """Cancel what is under way."""
        for part in self._under_way:
            part.cancel()
