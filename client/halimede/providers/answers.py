"""Parts of an answer, from plain lists of vectors or from the tensors of a built model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede.inputs.content import SpannedText
from halimede.providers.base import ragged
from halimede.results import UNKNOWN_TOKENS
from halimede_ops import vectors as ops
from halimede_ops.errors import ServerError
from halimede_ops.heads import NO_TOKEN
from halimede_ops.maxsim import without_padding
from halimede_ops.spans import NO_SPAN

REMOTE_PRECISION = "remote"
"""Precision of a provider that does not report it."""
SPAN_BYTES = 8
"""Two int32."""


def to_matrix(rows: Any, count: int) -> np.ndarray:
    """Convert lists of numbers to vectors `[count, dims]` float32.

    Raises:
        ServerError: there are not `count` rows of one length.
        NonFiniteVector: a row has NaN or infinity.
    """
    try:
        given = np.asarray(rows)
        if given.dtype.kind not in "fiu":  # not words or truth values, which NumPy would convert
            raise ValueError
        vectors = given.astype(np.float32)
    except (TypeError, ValueError):
        raise ServerError("the provider's answer is not a list of vectors.") from None
    if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        raise ServerError(f"{count} texts were sent; the answer's shape is {vectors.shape}.")
    ops.check_finite(vectors)
    return vectors


def truncate(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Keep the first `dimensions` components and normalise: `[rows, dims]` → `[rows, dimensions]`.

    Vectors that already have that length, and all vectors for None, are returned as they are.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return ops.normalise(ops.truncate(vectors, dimensions))


def sparse_rows(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sparse outputs of an answer, without padding: `[rows]` object, float32 matrices `[2, n]`.

    `ids` `[rows, longest]` int32 is padded with NO_TOKEN; `weights` `[rows, longest]` is float32.
    """
    filled = ids != NO_TOKEN
    return ragged(
        [
            np.stack([ids[row, use], weights[row, use]], dtype=np.float32, casting="same_kind")
            for row, use in enumerate(filled)
        ]
    )


def multi_rows(vectors: np.ndarray) -> np.ndarray:
    """Multi-vectors of an answer, without padding: `[rows]` object, float32 matrices `[n, width]`.

    `vectors` `[rows, longest, width]` float32 is padded with vectors of zeros.
    """
    return ragged([matrix.copy() for matrix in without_padding(vectors)])


def padded_spans(texts: Sequence[SpannedText]) -> np.ndarray:
    """The spans of texts: `[texts, most, 2]` int32, padded with NO_SPAN."""
    rows = [np.frombuffer(text.spans, "<i4").reshape(-1, 2) for text in texts]
    padded = np.full((len(rows), max(map(len, rows)), 2), NO_SPAN, np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def span_rows(
    embeddings: np.ndarray, weights: np.ndarray, texts: Sequence[SpannedText]
) -> np.ndarray:
    """Vectors and weights of spans of an answer, without padding: `[rows]` object, float32 matrices
    `[n, dims + 1]`.

    `embeddings` `[rows, most, dims]` and `weights` `[rows, most]` are float32.
    """
    joined = np.concatenate([embeddings, weights[..., None]], axis=-1)
    counts = [len(text.spans) // SPAN_BYTES for text in texts]
    return ragged([row[:count].copy() for row, count in zip(joined, counts, strict=True)])


def unknown_tokens(rows: int) -> np.ndarray:
    """Token counts `[rows]` int32 of a provider that does not report them."""
    return np.full(rows, UNKNOWN_TOKENS, np.int32)


def fingerprint(*facts: object) -> str:
    """Space of a model as 16 hex digits, from everything known that decides its vectors."""
    joined = "\0".join(str(fact) for fact in facts)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]
