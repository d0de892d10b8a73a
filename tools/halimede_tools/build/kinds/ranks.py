"""Ranks: how far the vectors of a late-interaction model order documents as the reference's do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede_ops import maxsim
from halimede_ops.text import Query
from halimede_tools.build.kinds import scores

RANKS = ("kendall_tau", "ndcg_10")
"""Figures of `agreement`, and fields of the bars that they are held to."""


def agreement(
    vectors: np.ndarray, expected: np.ndarray, counts: Sequence[int], inputs: Sequence[Any]
) -> dict[str, float]:
    """Kendall's tau and NDCG@10 of the order in which MaxSim ranks the documents of `inputs`, the
    mean over its queries.

    Args:
        vectors: the vectors of all inputs, one input after another, `[vectors, dims]` float32.
        expected: those of the reference.
        counts: vectors of each input.
        inputs: queries (`Query`) and documents (strings).
    """
    rankings = zip(_scores(vectors, counts, inputs), _scores(expected, counts, inputs), strict=True)
    pairs = list(rankings)
    return {
        "kendall_tau": float(np.mean([scores.kendall_tau(*pair) for pair in pairs])),
        "ndcg_10": float(np.mean([scores.ndcg(*pair) for pair in pairs])),
    }


def _scores(vectors: np.ndarray, counts: Sequence[int], inputs: Sequence[Any]) -> list[np.ndarray]:
    """For each query the scores of all documents."""
    matrices = np.split(np.nan_to_num(vectors), np.cumsum(counts)[:-1])
    documents = [
        matrix for matrix, item in zip(matrices, inputs, strict=True) if not isinstance(item, Query)
    ]
    return [
        maxsim.score(matrix, documents)
        for matrix, item in zip(matrices, inputs, strict=True)
        if isinstance(item, Query)
    ]
