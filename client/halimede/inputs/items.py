"""What is embedded: texts, images, and pairs of both, as bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

Kind = Literal["text", "image", "pair"]
"""A text; an image; a text and an image that stand for one thing, of which one may be missing."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Pair(NamedTuple):
    """A text and an image that are embedded as one. One of them may be missing."""

    text: bytes | None
    """In UTF-8."""
    image: bytes | None
    """The encoded file."""


Item = bytes | Pair
"""A text in UTF-8, an encoded image file, or a Pair, as its Kind says."""


@runtime_checkable
class Source(Protocol):
    """An item that is read when its turn comes, so that a call of many holds few in memory."""

    @property
    def held_bytes(self) -> int:
        """What it holds in memory already."""
        ...

    async def read(self, reader: Reader) -> Item:
        """The item.

        Raises:
            InvalidInput: it cannot be read, or is too large.
        """
        ...


class Reader(NamedTuple):
    """What sources are read with."""

    most_bytes: int
    """Size of the largest image taken."""
    fetch: Callable[[str, int], Awaitable[bytes]]
    """Gives what is at a url, of at most so many bytes."""


Given = bytes | Source
"""What a call is given for each item."""


def held_bytes(given: Given) -> int:
    """What it holds in memory."""
    return len(given) if isinstance(given, bytes) else given.held_bytes


def parts(item: Item) -> Sequence[bytes]:
    """The bytes that an item is made of; no two items of one kind are made of the same."""
    if isinstance(item, Pair):
        return (framed(item.text), framed(item.image))
    return (item,)


def framed(field: bytes | None) -> bytes:
    """The field behind its length; None differs from the empty one."""
    if field is None:
        return b"\xff" * 8
    return len(field).to_bytes(8, "little") + field
