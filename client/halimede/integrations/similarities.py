"""The similarities of sentence-transformers: a higher one means more alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from halimede_ops.vectors import normalise

SimilarityName = Literal["cosine", "dot", "euclidean", "manhattan"]
Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _matrix(vectors: np.ndarray) -> np.ndarray:
    return vectors[None] if vectors.ndim == 1 else vectors


def _rowwise(compare: Similarity) -> Similarity:
    """Return the function that compares each row of `a` to all rows of `b`."""

    def compared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = _matrix(a), _matrix(b)
        rows = [compare(row, b) for row in a]
        return np.stack(rows) if rows else np.empty((0, len(b)), a.dtype)

    return compared


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _matrix(a) @ _matrix(b).T


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return normalise(_matrix(a)) @ normalise(_matrix(b)).T


def _pairwise_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=-1)


def _pairwise_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product = (normalise(_matrix(a)) * normalise(_matrix(b))).sum(axis=-1)
    return product[0] if a.ndim == b.ndim == 1 else product


def _pairwise_euclidean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -np.sqrt(((a - b) ** 2).sum(axis=-1))


def _pairwise_manhattan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -np.abs(a - b).sum(axis=-1)


SIMILARITIES: Mapping[SimilarityName, Similarity] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _rowwise(_pairwise_euclidean),
    "manhattan": _rowwise(_pairwise_manhattan),
}
"""Name → `[n, dims]`, `[m, dims]` → `[n, m]`. A vector `[dims]` is one row."""
PAIRWISE: Mapping[SimilarityName, Similarity] = {
    "cosine": _pairwise_cosine,
    "dot": _pairwise_dot,
    "euclidean": _pairwise_euclidean,
    "manhattan": _pairwise_manhattan,
}
"""Name → `[n, dims]`, `[n, dims]` → `[n]`."""
