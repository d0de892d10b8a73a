"""Items as the requests to send: texts cut by tokens and bytes, alike in length; images alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from halimede.inputs.content import Content, Input, InputKind, memory_bytes

T = TypeVar("T")

REQUESTS_IN_FLIGHT = 4
"""Requests of one window that are on their way at once: the server's steps overlap."""
WINDOWS_IN_FLIGHT = 2
"""Windows of one stream that are on their way at once."""
IMAGES_IN_FLIGHT = 16
"""Images that an embedder has read and not yet got the answer of: each may have 10 MB."""


class Windowing(NamedTuple):
    """How a call is cut into windows: items that are looked up in the cache and sent together."""

    items: int
    in_flight: int
    """Windows of one call that are on their way at once."""


WINDOWING: Mapping[InputKind, Windowing] = {
    "text": Windowing(4096, WINDOWS_IN_FLIGHT),  # sorted by length together
    # Alone, each has an answer or an error of its own; the server batches across requests.
    "image": Windowing(1, IMAGES_IN_FLIGHT),
    "pair": Windowing(1, IMAGES_IN_FLIGHT),
}
REQUEST_BYTES = 8 * 1024 * 1024
"""Most bytes of text in one request."""
REQUEST_TOKENS = 32_768
"""Most tokens in one request, as estimated from bytes: 128 texts of 256 tokens."""
BYTES_PER_TOKEN = 4
"""English; other scripts have fewer tokens than this estimate says, or as many."""


def plan(texts: Sequence[Content], most_texts: int, max_tokens: int) -> list[list[int]]:
    """Indices of the texts of each request, longest texts first.

    Texts of one request are alike in length, so that little is padded. A request has at most
    `most_texts` texts, REQUEST_TOKENS estimated tokens and REQUEST_BYTES bytes; a single item of
    any kind is never cut.
    """
    requests: list[list[int]] = []
    tokens = size_bytes = 0
    for index in sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True):
        cost = min(max_tokens, len(texts[index]) // BYTES_PER_TOKEN + 2)
        tokens += cost
        size_bytes += len(texts[index])
        if (
            not requests
            or len(requests[-1]) == most_texts
            or tokens > REQUEST_TOKENS
            or size_bytes > REQUEST_BYTES
        ):
            requests.append([])
            tokens, size_bytes = cost, len(texts[index])
        requests[-1].append(index)
    return requests


class Windows:
    """Cuts a stream of items into windows, each to be embedded as one call."""

    def __init__(self, most_items: int) -> None:
        self._most_items = most_items
        self._items: list[Input] = []
        self._size_bytes = 0

    def add(self, item: Input) -> list[Input] | None:
        """The window that this item fills, or None."""
        self._items.append(item)
        self._size_bytes += memory_bytes(item)
        if len(self._items) == self._most_items or self._size_bytes >= REQUEST_BYTES:
            return self.rest()
        return None

    def rest(self) -> list[Input]:
        """What has not filled a window."""
        items, self._items, self._size_bytes = self._items, [], 0
        return items


async def together(jobs: Iterable[Callable[[], Awaitable[T]]], most: int) -> list[T]:
    """What the jobs return, in order, with `most` of them under way at once.

    When one fails or the caller gives up, the others are cancelled.
    """
    waiting = list(jobs)
    if len(waiting) == 1:
        return [await waiting[0]()]
    gate = asyncio.Semaphore(most)

    async def run(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    tasks = [asyncio.ensure_future(run(job)) for job in waiting]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
