"""Texts as UTF-8."""

from __future__ import annotations

from collections.abc import Sequence

from halimede_ops.errors import InvalidText


def encode_texts(texts: Sequence[str]) -> list[bytes]:
    """Encode texts as UTF-8.

    Raises:
        InvalidText: an element is not a string, or has a lone surrogate.
    """
    return [encode_text(text, index) for index, text in enumerate(texts)]


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
