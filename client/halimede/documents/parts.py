"""Parts of documents: chunks, or spans that are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from halimede.documents.chunking import Chunker
from halimede.inputs.texts import encode_texts
from halimede_ops.errors import InvalidInput, InvalidText

Spans = Sequence[Sequence[tuple[int, int]]]
"""For each document the spans to embed: start and end, in characters."""


class Parts(NamedTuple):
    """Parts of documents, in order."""

    documents: np.ndarray
    """`[parts]` int64: index of the document of each part."""
    spans: np.ndarray
    """`[parts, 2]` int64: start and end of each part, in characters of its document."""

    def texts(self, documents: Sequence[str]) -> list[str]:
        """The text of each part."""
        return [
            documents[document][start:end]
            for document, (start, end) in zip(self.documents, self.spans.tolist(), strict=True)
        ]


def check_documents(documents: Iterable[str] | str) -> list[str]:
    """Return the documents as a list. A single str is one document.

    Raises:
        InvalidInput: they are no ordered iterable.
        InvalidText: one is not a string, or has a lone surrogate.
    """
    texts = [documents] if isinstance(documents, str) else documents
    listed = list(texts) if isinstance(texts, Sequence) else texts
    return [text.decode() for text in encode_texts(listed)]


def chunked(documents: Sequence[str], chunker: Chunker) -> Parts:
    """Cut documents into chunks."""
    chunks = [chunker(document) for document in documents]
    numbers = np.repeat(np.arange(len(chunks)), [len(own) for own in chunks])
    spans = [(chunk.start, chunk.end) for own in chunks for chunk in own]
    return Parts(numbers.astype(np.int64), np.array(spans, np.int64).reshape(-1, 2))


def spanned(documents: Sequence[str], spans: Spans) -> Parts:
    """Return the given spans of documents as parts.

    Raises:
        InvalidInput: there is not a list of spans for each document, or a span is not within it.
    """
    if len(spans) != len(documents):
        raise InvalidInput(
            f"spans has {len(spans)} lists for {len(documents)} documents; give one for each."
        )
    numbers = np.repeat(np.arange(len(spans)), [len(own) for own in spans])
    listed = [span for own in spans for span in own]
    given = np.array(listed) if listed else np.empty((0, 2), np.int64)
    if given.shape != (len(listed), 2) or given.dtype.kind not in "iu":
        raise InvalidInput("spans has a span that is not (start, end), as whole numbers.")
    lengths = np.array([len(document) for document in documents], np.int64)[numbers]
    is_within = (given[:, 0] >= 0) & (given[:, 0] < given[:, 1]) & (given[:, 1] <= lengths)
    if not is_within.all():
        row = int(is_within.argmin())
        raise InvalidInput(
            f"has {lengths[row]:,} characters, and a span from {given[row, 0]:,} to "
            f"{given[row, 1]:,}. Give spans of one character or more in it.",
            subject="document",
            index=int(numbers[row]),
        )
    return Parts(numbers.astype(np.int64), given.astype(np.int64))


def joined(parts: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text that parts are of, and the span of each. Parts without white space between
    them get a space.

    Raises:
        InvalidText: a part is empty.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for index, part in enumerate(parts):
        if not part:
            raise InvalidText("is empty, and has no place in a text.", subject="text", index=index)
        if pieces and not (pieces[-1][-1].isspace() or part[0].isspace()):
            pieces.append(" ")
            length += 1
        spans.append((length, length + len(part)))
        pieces.append(part)
        length += len(part)
    return "".join(pieces), spans
