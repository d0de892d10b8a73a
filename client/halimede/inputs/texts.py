"""Texts as UTF-8."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Iterable, Mapping, Set
from typing import TypeVar

from halimede_ops.errors import InvalidInput, InvalidText

Stream = TypeVar("Stream")
SINGLE = (str, bytes, bytearray, memoryview, os.PathLike)
"""Types of one text or image. Some are iterables of letters or numbers."""
UNORDERED = (Mapping, Set)
"""Iterables whose elements have no place that a row of vectors could have."""


def encode_texts(texts: Iterable[str] | str) -> list[bytes]:
    """Encode texts as UTF-8. A single str is one text.

    Raises:
        InvalidInput: `texts` is no str and no ordered iterable.
        InvalidText: an element is not a string, or has a lone surrogate.
    """
    if isinstance(texts, str):
        return [encode_text(texts, 0)]
    if type(texts) is not list:
        refuse_async(stream_of(texts, "texts"), "texts")
    return [encode_text(text, index) for index, text in enumerate(texts)]


def refuse_async(values: object, name: str) -> None:
    """Raise InvalidInput if the argument `name` is an async iterable and no other."""
    if isinstance(values, AsyncIterable) and not _is_iterable(values):
        raise InvalidInput(
            f"{name} is an async iterable; give a list. AsyncEmbedder's embed_iter and "
            "embed_images_iter take async iterables."
        )


def stream_of(values: Stream, name: str) -> Stream:
    """Return the inputs of the argument `name`, unread: an iterable with an order, or an async one.

    Raises:
        InvalidInput: it is neither, or it is a single text, path or file.
    """
    if isinstance(values, SINGLE):
        raise InvalidInput(
            f"{name} is a single {type(values).__name__}; give a list or another iterable of "
            f"{name}."
        )
    if isinstance(values, UNORDERED) or not (
        isinstance(values, AsyncIterable) or _is_iterable(values)
    ):
        raise InvalidInput(
            f"{name} is {type(values).__name__}; give a list or another iterable of {name}."
        )
    return values


def _is_iterable(values: object) -> bool:
    try:
        iter(values)  # type: ignore[call-overload]
    except TypeError:  # also an array without dimensions
        return False
    return True


def encode_text(text: str, index: int) -> bytes:
    """Encode a text as UTF-8. `index` is its index in the call or stream, for errors.

    Raises:
        InvalidText: it is not a string, or has a lone surrogate.
    """
    if not isinstance(text, str):
        raise InvalidText(f"is {type(text).__name__}; give a str.", subject="text", index=index)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidText(
            "has a lone surrogate, which UTF-8 cannot hold. Decode it with errors='replace'.",
            subject="text",
            index=index,
        ) from None
