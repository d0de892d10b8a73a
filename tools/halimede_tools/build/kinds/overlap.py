"""Overlap: whether two sparse vectors have the same ids.

A cosine hardly changes if an id with a small weight comes or goes. A search engine stores each id.
"""

from __future__ import annotations

import numpy as np

NEAR_0 = 1e-3
"""Weights up to this come and go by the last bits of float32 that lie before a logarithm."""
TOP = 10
"""Ids with the largest weights that are compared."""


def agreement(weights: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far the ids of sparse vectors agree with those of the reference, `[texts, dims]` float32
    each: the share of texts with the same ids, those with weights near 0 left aside, and the share
    of the reference's TOP ids that are among the TOP ids.
    """
    pairs = list(zip(weights, expected, strict=True))
    return {
        "same_ids": float(np.mean([_have_same_ids(*pair) for pair in pairs])),
        "top_10": float(np.mean([_top_overlap(*pair) for pair in pairs])),
    }


def _have_same_ids(weights: np.ndarray, expected: np.ndarray) -> bool:
    differ = (weights > 0) != (expected > 0)
    return not (np.maximum(weights, expected)[differ] > NEAR_0).any()


def _top_overlap(weights: np.ndarray, expected: np.ndarray) -> float:
    wanted, found = (
        set(np.argsort(-row, kind="stable")[: min(TOP, int((row > 0).sum()))].tolist())
        for row in (expected, weights)
    )
    return len(wanted & found) / len(wanted) if wanted else float(not found)
