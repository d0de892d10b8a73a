"""Pairs of texts as UTF-8."""

from __future__ import annotations

from collections.abc import Iterable

from halimede.inputs.content import TextPair
from halimede.inputs.texts import SINGLE, encode_text, encode_texts, refuse_async, stream_of
from halimede_ops.errors import InvalidInput, InvalidText


def listed(documents: Iterable[str]) -> list[str]:
    """Return documents as a list, unchecked.

    Raises:
        InvalidInput: `documents` is no ordered iterable, or is a single text.
    """
    refuse_async(stream_of(documents, "documents"), "documents")
    return list(documents)


def query_pairs(query: str, documents: list[str]) -> list[TextPair]:
    """Return the pair of a query with each document.

    Raises:
        InvalidText: the query or a document is not a string, or has a lone surrogate.
    """
    try:
        first = encode_text(query, 0)
    except InvalidText as error:
        raise InvalidText(f"the query {error.args[0]}") from None
    return [TextPair(first, second) for second in encode_texts(documents)]


def text_pairs(pairs: Iterable[tuple[str, str]]) -> list[TextPair]:
    """Encode pairs of texts.

    Raises:
        InvalidInput: `pairs` is no ordered iterable, or an element is no pair.
        InvalidText: a text is not a string, or has a lone surrogate.
    """
    refuse_async(stream_of(pairs, "pairs"), "pairs")
    return [_text_pair(pair, index) for index, pair in enumerate(pairs)]


def paired(firsts: Iterable[str] | str, seconds: Iterable[str] | str) -> list[TextPair]:
    """Encode texts and the second text of each.

    Raises:
        InvalidInput: their numbers differ, or they are no ordered iterables.
        InvalidText: a text is not a string, or has a lone surrogate.
    """
    first, second = encode_texts(firsts), encode_texts(seconds)
    if len(first) != len(second):
        raise InvalidInput(
            f"there are {len(first)} texts and {len(second)} second texts in pairs; give one "
            "second text for each text."
        )
    return list(map(TextPair, first, second))


def _text_pair(pair: tuple[str, str], index: int) -> TextPair:
    if isinstance(pair, SINGLE) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidInput(
            f"is {type(pair).__name__}; give two texts, such as (query, document).",
            subject="pair",
            index=index,
        )
    return TextPair(encode_text(pair[0], index), encode_text(pair[1], index))
