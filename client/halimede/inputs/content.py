"""What is embedded: texts, images, and pairs of both, as bytes or as inputs that are read later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

InputKind = Literal["text", "image", "pair"]
"""A text, an image, or a text and an image that are embedded as one vector."""

EMBEDDER_METHODS: Mapping[InputKind, str] = {
    "text": "embed",
    "image": "embed_images",
    "pair": "embed_multimodal",
}
"""The embedder's method for each kind."""
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)


class Pair(NamedTuple):
    """A text and an image that are embedded as one vector. Either may be None."""

    text: bytes | None
    """UTF-8."""
    image: bytes | None
    """The encoded file."""


Content = bytes | Pair
"""A UTF-8 text, an encoded image file, or a Pair, as its InputKind says."""


class ReadOptions(NamedTuple):
    """How lazy inputs are read."""

    max_bytes: int
    """Largest image allowed, in bytes."""
    fetch: Callable[[str, int], bytes]
    """Returns the content of a URL, at most the given number of bytes. Blocks."""


@runtime_checkable
class LazyInput(Protocol):
    """An input that is read just before it is sent, so that a large call stays small in memory."""

    @property
    def memory_bytes(self) -> int:
        """Bytes that the input holds in memory before it is read."""
        ...

    def read(self, options: ReadOptions) -> Content:
        """Return the content. It may block.

        Raises:
            InvalidInput: it cannot be read, or is too large.
        """
        ...


Input = bytes | LazyInput
"""One input of a call."""


def memory_bytes(value: Input) -> int:
    """Bytes that an input holds in memory."""
    return len(value) if isinstance(value, bytes) else value.memory_bytes


def serialise(content: Content) -> bytes:
    """Bytes that differ between any two contents of one kind, for hashes and cache keys."""
    if isinstance(content, Pair):
        return length_prefixed(content.text) + length_prefixed(content.image)
    return content


def length_prefixed(field: bytes | None) -> bytes:
    """The field behind its length as 8 bytes, little endian. None differs from an empty field."""
    if field is None:
        return b"\xff" * 8
    return len(field).to_bytes(8, "little") + field
