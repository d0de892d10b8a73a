"""MaxSim: the late-interaction score of a query and a document, each with several vectors.

The score is the sum, over the query's vectors, of the largest dot product with a vector of the
document (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from halimede_ops.errors import InvalidInput

BLOCK_VECTORS = 16_384
"""Document vectors that are compared at once, beside those of the last document. It bounds the
memory that a call needs."""


def score(query: np.ndarray, documents: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Score each document against a query: `[documents]` float32, higher is more relevant.

    Args:
        query: `[query vectors, width]` float.
        documents: for each document `[vectors, width]` float. Their numbers of vectors may differ,
            and every vector counts: take away padding with `without_padding` first. A document
            without vectors scores 0.

    Raises:
        InvalidInput: an array is no matrix, or its width is not the query's.
    """
    query = np.asarray(query, np.float32)
    if query.ndim != 2:
        raise InvalidInput(f"query has the shape {query.shape}; give [vectors, width].")
    matrices = [_document(values, query, index) for index, values in enumerate(documents)]
    scores = np.zeros(len(matrices), np.float32)
    for rows in _blocks([len(matrix) for matrix in matrices]):
        parts = [matrices[row] for row in rows]
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        dots = np.concatenate(parts) @ query.T
        scores[rows] = np.maximum.reduceat(dots, starts, axis=0).sum(axis=1)
    return scores


def rank(
    query: np.ndarray, documents: Sequence[np.ndarray] | np.ndarray, top_k: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Order documents by `score`, best first: their indices `[n]` int64 and scores `[n]` float32.

    Documents of equal score keep their order. `top_k` is the number of documents to return; None
    returns all.

    Raises:
        InvalidInput: as for `score`, or `top_k` is below 1.
    """
    if top_k is not None and top_k < 1:
        raise InvalidInput(f"top_k is {top_k}; give 1 or more, or omit it for all documents.")
    scores = score(query, documents)
    order = best_first(scores)[:top_k]
    return order, scores[order]


def best_first(scores: np.ndarray) -> np.ndarray:
    """Indices that sort scores `[n]` float in descending order: `[n]` int64. Equal scores keep
    their order.
    """
    return np.argsort(-scores, kind="stable")


class Distinct(NamedTuple):
    """The texts of pairs of a query and a document, each of them once."""

    texts: list[str]
    input_types: list[str]
    """`query` or `document` for each text."""
    queries: list[int]
    """For each pair the index of its query in `texts`."""
    documents: list[int]
    """For each pair the index of its document in `texts`."""


def distinct(queries: Sequence[str], documents: Sequence[str]) -> Distinct:
    """Find the texts to embed for pairs: a query of many documents is embedded once."""
    texts: dict[tuple[str, str], int] = {}
    rows = [
        [texts.setdefault((kind, text), len(texts)) for text in part]
        for kind, part in (("query", queries), ("document", documents))
    ]
    return Distinct([text for _, text in texts], [kind for kind, _ in texts], *rows)


def score_pairs(matrices: Sequence[np.ndarray], pairs: Distinct) -> np.ndarray:
    """Score pairs by the vectors of their texts: `[pairs]` float32.

    `matrices` has `[vectors, width]` float32 for each of `pairs.texts`, without padding.
    """
    scores = np.zeros(len(pairs.queries), np.float32)
    queries = np.asarray(pairs.queries)
    for query in set(pairs.queries):
        rows = np.flatnonzero(queries == query)
        documents = [matrices[pairs.documents[row]] for row in rows]
        scores[rows] = score(matrices[query], documents)
    return scores


def without_padding(vectors: np.ndarray) -> list[np.ndarray]:
    """Take away the rows of zeros that pad each matrix at its end.

    `[batch, longest, width]` float → for each matrix `[vectors, width]`, a view.
    """
    lengths = [int(np.flatnonzero(matrix.any(axis=1)).max(initial=-1)) + 1 for matrix in vectors]
    return [matrix[:length] for matrix, length in zip(vectors, lengths, strict=True)]


def _document(values: np.ndarray, query: np.ndarray, index: int) -> np.ndarray:
    matrix = np.asarray(values, np.float32)
    if matrix.ndim != 2 or matrix.shape[1] != query.shape[1]:
        raise InvalidInput(
            f"has the shape {matrix.shape}; give [vectors, {query.shape[1]}], the query's width.",
            subject="document",
            index=index,
        )
    return matrix


def _blocks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut the documents that have vectors into blocks of about BLOCK_VECTORS vectors."""
    block: list[int] = []
    size = 0
    for row, length in enumerate(lengths):
        if not length:
            continue
        block.append(row)
        size += length
        if size >= BLOCK_VECTORS:
            yield block
            block, size = [], 0
    if block:
        yield block
