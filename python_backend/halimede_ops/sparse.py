"""Sparse vectors: of a row with a weight for each id, only the ids whose weight is not 0.

The vector of a sparse model has as many weights as its vocabulary has tokens, and a few hundred of
them are above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halimede_ops import heads, vectors

IDS, WEIGHTS = "SPARSE_IDS", "SPARSE_WEIGHTS"
"""Outputs that clients get."""


class SparseRow(NamedTuple):
    """The sparse vector of one text."""

    ids: np.ndarray
    """Ids `[n]` int32, ascending."""
    weights: np.ndarray
    """The weight of each id, `[n]` float32: above 0, or NaN if the model gives that."""

    @property
    def nbytes(self) -> int:
        """Size of both arrays, in bytes."""
        return int(self.ids.nbytes + self.weights.nbytes)


def from_dense(rows: np.ndarray) -> list[SparseRow]:
    """The sparse form of rows `[batch, dims]` float32, in order. NaN is kept."""
    # NaN is not above 0, but must not look like a weight of 0.
    places = [np.flatnonzero(~(row <= 0)) for row in rows]
    return [
        SparseRow(ids.astype(np.int32), row[ids]) for row, ids in zip(rows, places, strict=True)
    ]


def to_dense(rows: Sequence[SparseRow], dims: int) -> np.ndarray:
    """The rows with all their weights: `[len(rows), dims]` float32."""
    dense = np.zeros((len(rows), dims), np.float32)
    for row, (ids, weights) in zip(dense, rows, strict=True):
        row[ids] = weights
    return dense


def outputs(rows: Sequence[SparseRow]) -> dict[str, np.ndarray]:
    """The outputs that clients get: IDS and WEIGHTS, as `heads.padded`.

    Raises:
        NonFiniteVector: a row has NaN or infinity.
    """
    ids, weights = heads.padded(rows)
    vectors.check_finite(weights)
    return {IDS: ids, WEIGHTS: weights}
