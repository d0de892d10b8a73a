"""Late chunking: vectors of the parts of a document, each made with the document as its context.

A document beyond the model's token limit is read in windows that overlap. The published rule takes
the tokens of an overlap from the earlier window, whose last tokens then have nothing behind them
(Günther et al., 2024, algorithm 2). Here each window gives half of the overlap: every token is
taken from the window where it is farther from the edge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from halimede.documents.parts import Parts
from halimede.documents.tokenizers import ModelTokenizer
from halimede.inputs.content import SpannedText
from halimede.inputs.options import CallOptions, check_whole
from halimede.results import DocumentEmbeddings, MultiEmbeddings
from halimede_ops import cuts, vectors
from halimede_ops.errors import InvalidInput, InvalidText, SpaceRefused
from halimede_ops.quantise import quantise

MAX_OVERLAP = 512
"""Tokens of the default overlap of windows, or a quarter of a window if that is less."""
CHARACTERS_PER_TOKEN = 6
"""A window is looked for in a text of so many characters for each token, at first."""


class Window(NamedTuple):
    """A part of a document that the model reads in one pass."""

    start: int
    end: int
    """In characters of the document."""
    first: int
    behind: int
    """The characters whose tokens are taken from this window, in characters of the document."""


class Windower:
    """Cuts documents into windows for one model."""

    def __init__(
        self, tokenizer: ModelTokenizer, overlap: int | None, input_type: str | None
    ) -> None:
        """Prepare to cut documents.

        Args:
            tokenizer: the model's tokenizer.
            overlap: tokens that neighbouring windows share. None: a quarter of a window, at most
                MAX_OVERLAP.
            input_type: input type whose prompt stands before each window.

        Raises:
            InvalidInput: the overlap leaves no room for new text in every window.
        """
        self._tokenizer = tokenizer
        self._input_type = input_type
        self._places = cuts.places(tokenizer.tokenizer) or re.compile(r"(?!)")
        self._limit = tokenizer.spec.max_tokens
        self._room = self._limit - self._count("")
        default = max(0, min(MAX_OVERLAP, self._room // 4))
        self._overlap = default if overlap is None else check_whole("window_overlap", overlap, 0)
        if self._overlap > max(0, self._room // 2):
            raise InvalidInput(
                f"window_overlap is {self._overlap:,}; {tokenizer.spec.name} reads {self._room:,} "
                "tokens of text in one pass. Give at most half of that."
            )

    def __call__(self, text: str) -> Iterator[Window]:
        """Yield the windows of a text, in order. Each of its characters is taken from one."""
        start = first = 0
        while True:
            starts = self._tokens_from(text, start)
            if starts is None:
                yield Window(start, len(text), first, len(text))
                return
            end = self._end(text, start, starts)
            count = int(np.searchsorted(starts, end))
            after = self._start_after(text, start, end, starts[:count], count - self._overlap)
            middle = starts[max(0, count - self._overlap // 2)]
            behind = max(first, min(end, max(after, middle)))
            yield Window(start, end, first, behind)
            start, first = after, behind

    def _tokens_from(self, text: str, start: int) -> list[int] | None:
        """Where the tokens of a window from `start` on begin, one more than it may have. None: the
        rest of the text is one window.
        """
        length = CHARACTERS_PER_TOKEN * self._room
        while True:
            part = text[start : start + length]
            is_rest = start + length >= len(text)
            offsets = self._tokenizer.tokenizer.encode(part, add_special_tokens=False).offsets
            if is_rest and len(offsets) <= self._room and self._count(part) <= self._limit:
                return None
            if is_rest or len(offsets) > self._room:
                begins = [start + begin for begin, _ in offsets[: self._room + 1]]
                return begins if len(offsets) > self._room else [*begins, len(text)]
            length *= 2

    def _end(self, text: str, start: int, starts: Sequence[int]) -> int:
        """The end of a window, which has as many tokens as the model takes with prompt and special
        tokens. At most a quarter of them is given up to end it where no token changes.
        """
        count = len(starts) - 1
        while True:
            most = max(start + 1, starts[count])
            end = self._place(text, max(start + 1, starts[count * 3 // 4]), most) or most
            excess = self._count(text[start:end]) - self._limit
            if excess <= 0:
                return end
            if end == start + 1:
                raise InvalidInput(
                    f"{self._tokenizer.spec.name} takes {self._limit:,} tokens, and a character "
                    "of the text has more with special tokens and prompt."
                )
            count = max(0, count - excess)

    def _start_after(
        self, text: str, start: int, end: int, starts: Sequence[int], token: int
    ) -> int:
        """The start of the next window: before a token of this one, where no token changes."""
        most = end if token >= len(starts) else min(end, starts[max(0, token)])
        least = starts[max(0, token - self._overlap // 2)] if self._overlap else end
        place = self._place(text, max(start + 1, min(least, most)), most) or most
        return max(start + 1, place)

    def _place(self, text: str, least: int, most: int) -> int | None:
        """The last place in `least` … `most` where a cut changes no token; None without one."""
        places = [
            found.start()
            for found in self._places.finditer(text, least, min(len(text), most + 2))
            if found.start() <= most
        ]
        return places[-1] if places else None

    def _count(self, text: str) -> int:
        [tokens] = self._tokenizer.reader.encode([text], [self._input_type])
        return tokens.total


class LateParts(NamedTuple):
    """The windows that are read for the parts of documents, and how their vectors are joined."""

    inputs: list[SpannedText]
    """The windows that have tokens of a part."""
    places: list[np.ndarray]
    """For each input `[n]` int64: the part that each of its spans is of."""
    documents: np.ndarray
    """`[inputs]` int64: index of the document of each input."""
    parts: Parts
    tokenizer: ModelTokenizer
    texts: Sequence[str]
    """The documents."""
    options: CallOptions

    def result(self, answer: MultiEmbeddings) -> DocumentEmbeddings:
        """Join the vectors of the windows: cut, normalise and quantise them as an embedder does.

        Raises:
            InvalidText: a part has no token.
            SpaceRefused: a model of another space answered.
        """
        spec, options = self.tokenizer.spec, self.options
        if answer.space != spec.space:
            raise SpaceRefused(
                f"{answer.model} has space {answer.space}; the documents were cut for {spec.space}."
            )
        count = len(self.parts.documents)
        sums = np.zeros((count, spec.dims + 1), np.float32)
        cached, versions = np.ones(count, np.bool_), np.zeros(count, np.int64)
        for row, places in enumerate(self.places):
            vector, weight = answer.vectors[row][:, :-1], answer.vectors[row][:, -1:]
            sums[places, :-1] += vector * weight
            sums[places, -1:] += weight
            cached[places] &= answer.cached[row]
            versions[places] = answer.versions[row]
        weights = sums[:, -1:]
        self._check(weights[:, 0])
        embedded = vectors.embed(sums[:, :-1] / weights, spec, options.dimensions)
        dims = embedded.shape[1]
        if options.output_type != "float32":
            embedded = quantise(embedded, options.output_type, options.ranges)
        facts: dict[str, Any] = vars(answer) | {
            "vectors": embedded,
            "tokens": self._tokens(),
            "cached": cached,
            "versions": versions,
            "indices": self.parts.documents,
        }
        return DocumentEmbeddings(
            spans=self.parts.spans, late=True, dims=dims, output_type=options.output_type, **facts
        )

    def _check(self, weights: np.ndarray) -> None:
        if not weights.all():
            part = int((weights != 0).argmin())
            start, end = self.parts.spans[part]
            raise InvalidText(
                f"has no token from character {start:,} to {end:,}, so that no vector can be "
                "taken from there. Leave it out.",
                subject="text",
                index=int(self.parts.documents[part]),
            )

    def _tokens(self) -> np.ndarray:
        parts = self.parts.texts(self.texts)
        encoded = self.tokenizer.reader.encode(parts, [self.options.input_type] * len(parts))
        return np.array([tokens.total for tokens in encoded], np.int32)


def late_parts(
    documents: Sequence[str],
    parts: Parts,
    tokenizer: ModelTokenizer,
    overlap: int | None,
    options: CallOptions,
) -> LateParts:
    """Cut documents into windows, and find the parts that each window has tokens of.

    Raises:
        InvalidInput: `overlap` leaves no room for new text in every window.
    """
    windower = Windower(tokenizer, overlap, options.input_type)
    inputs, places, numbers = [], [], []
    bounds = np.searchsorted(parts.documents, np.arange(len(documents) + 1))
    for document, text in enumerate(documents):
        own = np.arange(bounds[document], bounds[document + 1])
        for window in windower(text) if len(own) else ():
            clipped = np.clip(parts.spans[own], window.first, window.behind)
            is_used = clipped[:, 0] < clipped[:, 1]
            if is_used.any():
                spanned = (clipped[is_used] - window.start).astype("<i4")
                part = text[window.start : window.end].encode()
                inputs.append(SpannedText(part, spanned.tobytes()))
                places.append(own[is_used])
                numbers.append(document)
    return LateParts(
        inputs, places, np.array(numbers, np.int64), parts, tokenizer, documents, options
    )
