"""How a call is cut: windows of inputs, and requests of texts of similar length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from halimede.inputs.content import Content, Input, InputKind, memory_bytes, size_bytes
from halimede_ops.spec import MAX_REQUEST_BYTES

REQUESTS_IN_FLIGHT = 4
"""Requests of one window that run at once, so that the server's steps overlap."""
WINDOWS_IN_FLIGHT = 2
"""Windows of one call, and parts of one stream, that run at once."""
IMAGES_IN_FLIGHT = 16
"""Images that an embedder has read and that are not answered: each may have 10 MB."""


class Windowing(NamedTuple):
    """How a call is cut into windows: inputs that are looked up in the cache and sent together."""

    inputs: int
    in_flight: int
    """Windows of one call that run at once."""


WINDOWING: Mapping[InputKind, Windowing] = {
    "text": Windowing(4096, WINDOWS_IN_FLIGHT),  # sorted by length together
    # Alone, each has an answer or an error of its own. The server batches across requests.
    "image": Windowing(1, IMAGES_IN_FLIGHT),
    "pair": Windowing(1, IMAGES_IN_FLIGHT),
    "text_pair": Windowing(4096, WINDOWS_IN_FLIGHT),
}
REQUEST_BYTES = MAX_REQUEST_BYTES
"""Maximum bytes of text in one request: what a server takes."""
REQUEST_TOKENS = 32_768
"""Maximum tokens in one request, as estimated from bytes: 128 texts of 256 tokens."""
BYTES_PER_TOKEN = 4
"""English. Other scripts have at most as many tokens as this estimate says."""


def plan_requests(texts: Sequence[Content], max_texts: int, max_tokens: int) -> list[list[int]]:
    """Return the indices of the texts or text pairs of each request, longest first.

    Texts of one request have similar lengths, so that there is little padding. A request has at
    most `max_texts` texts, REQUEST_TOKENS estimated tokens and REQUEST_BYTES bytes. A single input
    of any kind is never cut. The length of a pair is that of both its texts.
    """
    if len(texts) == 1:
        return [[0]]
    sizes = list(map(size_bytes, texts))
    requests: list[list[int]] = []
    tokens = total_bytes = 0
    for index in sorted(range(len(texts)), key=sizes.__getitem__, reverse=True):
        cost = min(max_tokens, sizes[index] // BYTES_PER_TOKEN + 2)
        tokens += cost
        total_bytes += sizes[index]
        if (
            not requests
            or len(requests[-1]) == max_texts
            or tokens > REQUEST_TOKENS
            or total_bytes > REQUEST_BYTES
        ):
            requests.append([])
            tokens, total_bytes = cost, sizes[index]
        requests[-1].append(index)
    return requests


class Windows:
    """Cuts a stream of inputs into windows."""

    def __init__(self, max_inputs: int) -> None:
        self._max_inputs = max_inputs
        self._inputs: list[Input] = []
        self._size_bytes = 0

    def add(self, value: Input) -> list[Input] | None:
        """Add an input. Return the window that it fills, or None."""
        self._inputs.append(value)
        self._size_bytes += memory_bytes(value)
        if len(self._inputs) == self._max_inputs or self._size_bytes >= REQUEST_BYTES:
            return self.rest()
        return None

    def rest(self) -> list[Input]:
        """Return the inputs that have not filled a window."""
        inputs, self._inputs, self._size_bytes = self._inputs, [], 0
        return inputs
