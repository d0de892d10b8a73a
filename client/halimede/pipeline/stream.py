"""A stream of inputs, cut into parts that are sent ahead and returned in order."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from halimede.inputs.content import Input
from halimede.observability.progress import Progress
from halimede.pipeline.batching import WINDOWS_IN_FLIGHT, Windows
from halimede.results import Embeddings
from halimede_ops.errors import SpaceRefused

F = TypeVar("F")
"""The future of a part: concurrent.futures' or asyncio's."""


class Stream(Generic[F]):
    """The parts of one stream."""

    def __init__(
        self, window: int, encode: Callable[[Any, int], Input], progress: Progress
    ) -> None:
        """A stream of parts of `window` inputs. `encode` makes an input, given its index."""
        self._windows = Windows(window)
        self._encode = encode
        self._progress = progress
        self._count = 0
        self._under_way: deque[F] = deque()
        self._space: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether a part should be returned before more is sent."""
        return len(self._under_way) > WINDOWS_IN_FLIGHT

    @property
    def is_under_way(self) -> bool:
        """Whether a part was sent and not returned."""
        return bool(self._under_way)

    def cut(self, values: Iterable[Any]) -> Iterator[list[Input]]:
        """Iterate over the parts."""
        for value in values:
            if (part := self._add(value)) is not None:
                yield part
        if part := self._windows.rest():
            yield part

    async def cut_async(
        self, values: Iterable[Any] | AsyncIterable[Any]
    ) -> AsyncIterator[list[Input]]:
        """Iterate over the parts of a stream of either kind."""
        if not isinstance(values, AsyncIterable):
            for part in self.cut(values):
                yield part
            return
        async for value in values:
            if (filled := self._add(value)) is not None:
                yield filled
        if rest := self._windows.rest():
            yield rest

    def first(self, part: Sequence[Input]) -> int:
        """Return the index in the stream of the first input of the part just cut."""
        return self._count - len(part)

    def send(self, part: F) -> None:
        """Note that a part is under way."""
        self._under_way.append(part)

    def next(self) -> F:
        """Return the part to be returned next. It stays under way until `checked`."""
        return self._under_way[0]

    def checked(self, part: Embeddings) -> Embeddings:
        """Return the part.

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
        self._progress.advance(len(part) + len(part.errors))
        return part

    def close(self) -> None:
        """Cancel the parts under way."""
        for part in self._under_way:
            part.cancel()  # type: ignore[attr-defined]

    def _add(self, value: Any) -> list[Input] | None:
        part = self._windows.add(self._encode(value, self._count))
        self._count += 1
        return part
