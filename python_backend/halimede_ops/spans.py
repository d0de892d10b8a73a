"""Late chunking: vectors of the spans of a text, from one pass over the whole text.

Günther et al., "Late Chunking: Contextual Chunk Embeddings Using Long-Context Embedding Models",
2024: the vector of a span is the mean of the vectors of its tokens, each of which the model made
with the whole text as its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halimede_ops import vectors
from halimede_ops.errors import InvalidInput, InvalidText
from halimede_ops.spec import ModelSpec

NO_SPAN = -1
"""Start and end of a place without a span, in a row with fewer spans than another."""
NONE = np.zeros((1, 2), np.int64)
"""The tokens of a text without spans: one span without tokens."""


class Spanned(NamedTuple):
    """A text whose spans have vectors of their own."""

    text: str
    spans: np.ndarray
    """`[spans, 2]` int64: start and end of each span, in characters of `text`."""


def check(spans: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return spans as int64, unless one is not within its text.

    `spans` `[texts, n, 2]` int: start and end in characters (Unicode code points), or both NO_SPAN.

    Raises:
        InvalidInput: there are not as many rows as texts, or a span is empty or not within its
            text.
    """
    if len(spans) != len(texts):
        raise InvalidInput(
            f"SPANS has {len(spans)} rows for {len(texts)} texts; send one row for each."
        )
    starts, ends = np.moveaxis(spans.astype(np.int64), -1, 0)
    lengths = np.array([len(text) for text in texts], np.int64)[:, None]
    is_none = (starts == NO_SPAN) & (ends == NO_SPAN)
    is_right = is_none | ((starts >= 0) & (starts < ends) & (ends <= lengths))
    if not is_right.all():
        row, place = np.argwhere(~is_right)[0]
        raise InvalidInput(
            f"SPANS has a span from {starts[row, place]:,} to {ends[row, place]:,} for text {row}, "
            f"which has {len(texts[row]):,} characters. Send spans of one character or more in it, "
            f"and {NO_SPAN}, {NO_SPAN} where a row has fewer."
        )
    return np.stack([starts, ends], axis=-1)


def check_whole(totals: Sequence[int], spans: Sequence[np.ndarray | None], spec: ModelSpec) -> None:
    """Raise unless each text with spans was read to its end.

    `totals` are the tokens of each whole text, `spans` those that `tokens_of` gave.

    Raises:
        InvalidText: one was truncated: its last spans lack tokens.
    """
    for index, (total, own) in enumerate(zip(totals, spans, strict=True)):
        if total > spec.max_tokens and own is not None and own.any():
            raise InvalidText(
                f"has {total:,} tokens; {spec.name} takes {spec.max_tokens:,} in one pass. Send it "
                "as overlapping parts, as Embedder.embed_documents does.",
                subject="text",
                index=index,
            )


def tokens_of(offsets: Sequence[tuple[int, int]], spans: np.ndarray) -> np.ndarray:
    """The tokens of each span: `[spans, 2]` int64, the first one and the one behind the last.

    A token belongs to a span if it begins before the span's end and ends behind its start. Special
    tokens belong to none. A span without a token has 0 and 0.

    Args:
        offsets: start and end of each token, in characters. Those of special tokens are 0. Of white
            space alone, some tokenizers give an empty range.
        spans: `[spans, 2]` int64: start and end of each span, in characters.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    tokens = np.flatnonzero(ends)
    if not len(tokens):
        return np.zeros((len(spans), 2), np.int64)
    first = np.searchsorted(np.maximum.accumulate(ends[tokens]), spans[:, 0], side="right")
    behind = np.searchsorted(
        np.minimum.accumulate(starts[tokens][::-1])[::-1], spans[:, 1], side="left"
    )
    has_tokens = (behind > first) & (spans[:, 1] > spans[:, 0])
    last = len(tokens) - 1
    ranges = np.stack([tokens[np.minimum(first, last)], tokens[behind - 1] + 1], axis=1)
    return np.where(has_tokens[:, None], ranges, 0)


def sums(vectors_of_tokens: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The sum of the vectors of each span's tokens, and how many these are, as the last component.

    `vectors_of_tokens` `[tokens, width]` float32, `tokens` as `tokens_of` gives it →
    `[spans, width + 1]` float32.
    """
    summed = np.zeros((len(tokens), vectors_of_tokens.shape[1] + 1), np.float32)
    for place, (first, behind) in enumerate(tokens):
        if behind > first:
            summed[place, :-1] = vectors_of_tokens[first:behind].sum(axis=0, dtype=np.float64)
            summed[place, -1] = behind - first
    return summed


def outputs(
    summed: np.ndarray, spec: ModelSpec, dimensions: int | None = None
) -> dict[str, np.ndarray]:
    """Make the outputs that clients get of spans, from what `sums` gives: name → array.

    `summed` `[batch, spans, dims + 1]` float32 → SPAN_EMBEDDINGS `[batch, spans, dimensions]`
    float32, and SPAN_WEIGHTS `[batch, spans]` float32. A span without tokens has zeros.

    The weight of a span is its number of tokens, times the length of their mean if vectors are
    normalised: `join` needs it.

    Raises:
        InvalidDimensions: `dimensions` is outside 1 … `spec.dims`.
        NonFiniteVector: a vector of a text has NaN or infinity.
    """
    counts = summed[..., -1]
    means = summed[..., :-1] / np.maximum(counts, 1)[..., None]
    vectors.check_finite(means)
    rows = means.reshape(-1, means.shape[-1])
    embedded = vectors.embed(rows, spec, dimensions).reshape(*means.shape[:-1], -1)
    lengths = np.linalg.norm(means, axis=-1) if spec.normalised else np.float32(1)
    return {
        "SPAN_EMBEDDINGS": embedded,
        "SPAN_WEIGHTS": np.asarray(counts * lengths, np.float32),
    }


def join(embeddings: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The vector of a span from those of its parts, neither cut nor normalised.

    `embeddings` `[parts, dims]` float32 and `weights` `[parts]` float32, as `outputs` gives them
    without `dimensions` → `[dims]` float32. Its direction is that of the mean of all tokens; for a
    model whose vectors are not normalised it is this mean.
    """
    total = np.maximum(weights.sum(dtype=np.float64), 1e-12)
    return np.asarray((embeddings * (weights / total)[:, None]).sum(axis=0), np.float32)
