"""Scores: the bars of rerankers and classifiers, and how their scores are compared.

A cosine says nothing of a score. In FP32 the scores themselves must be those of the reference. In a
lower precision a reranker must rank the documents of a query alike, and a classifier must choose
the same label.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

RANKED = 10
"""Documents at the top of a ranking that NDCG looks at."""
TIE = 1e-5
"""Difference between scores that rounding makes, as a share of their range."""


@dataclasses.dataclass(frozen=True)
class ScoreBar:
    """What a precision must reach to be published."""

    max_difference: float
    """Largest difference of a score to the reference's; infinite where only the order counts."""
    kendall_tau: float
    """Kendall's tau of the rankings of a query's documents, the mean over all queries."""
    ndcg_10: float
    """NDCG@10 of the same, where the reference's first ten documents have the gains 10, 9, …, 1."""
    label_agreement: float
    """Share of inputs with the same best label."""
    invariance: float
    """Largest difference of an input's score alone to its score in a batch, as a share of the range
    of all scores."""
    size_ratio: float
    """Largest file size against FP32."""


ANY = float("inf")
SCORE_BARS = {
    "fp32": ScoreBar(1e-4, 0.999, 0.9999, 0.999, invariance=1e-4, size_ratio=1.0),
    "fp16": ScoreBar(ANY, 0.98, 0.995, 0.99, invariance=2e-3, size_ratio=0.52),
    "int8": ScoreBar(ANY, 0.90, 0.97, 0.95, invariance=2e-3, size_ratio=0.30),
}


def agreement(scores: np.ndarray, expected: np.ndarray, inputs: Sequence[Any]) -> dict[str, float]:
    """How far scores agree with those of the reference, `[inputs, labels]` float32 each.

    Rankings are compared over the documents of each query: the pairs of a query follow each other.
    A score that is not finite agrees with none.
    """
    finite = np.isfinite(scores) & np.isfinite(expected)
    scores = np.where(finite, scores, np.float32(np.finfo(np.float32).max))
    figures = {"max_difference": float(np.abs(scores - expected).max())}
    if scores.shape[1] > 1:
        same = scores.argmax(axis=1) == expected.argmax(axis=1)
        return figures | {"label_agreement": float(same.mean())}
    groups = [
        [index for index, _ in group]
        for _, group in itertools.groupby(enumerate(inputs), key=lambda entry: entry[1][0])
    ]
    rankings = [(scores[rows, 0], expected[rows, 0]) for rows in groups if len(rows) > 1]
    return figures | {
        "kendall_tau": float(np.mean([kendall_tau(*pair) for pair in rankings])),
        "ndcg_10": float(np.mean([ndcg(*pair) for pair in rankings])),
    }


def missed(record: dict[str, Any], bar: ScoreBar) -> list[str]:
    """What a record misses of its precision's bar: each figure with its bar."""
    below = [
        f"{name} is {record[name]}, the bar is {getattr(bar, name)}"
        for name in ("kendall_tau", "ndcg_10", "label_agreement")
        if name in record and not record[name] >= getattr(bar, name)
    ]
    return below + [
        f"{name} is {record[name]}, the bar is {getattr(bar, name)}"
        for name in ("max_difference", "invariance", "size_ratio")
        if not record[name] <= getattr(bar, name)
    ]


def spread(scores: np.ndarray) -> float:
    """The range of all scores; the smallest number above 0 if they are equal."""
    return max(float(np.ptp(scores)), float(np.finfo(np.float32).tiny))


def kendall_tau(scores: np.ndarray, expected: np.ndarray) -> float:
    """Kendall's tau-b of two lists of scores, `[documents]` each; 1 if one of them has no order."""
    from scipy.stats import kendalltau

    tau = kendalltau(scores, expected).statistic
    return 1.0 if np.isnan(tau) else float(tau)


def ndcg(scores: np.ndarray, expected: np.ndarray, first: int = RANKED) -> float:
    """NDCG of a ranking by `scores`; the first of the order of `expected` have the gains `first`,
    …, 1. Documents whose expected scores are equal but for rounding share their gains.
    """
    order = np.argsort(-expected, kind="stable")
    ordered = np.maximum(first - np.arange(len(order)), 0).astype(np.float64)
    begins = np.diff(-expected[order], prepend=-np.inf) > TIE * spread(expected)
    group = np.cumsum(begins) - 1
    ordered = (np.bincount(group, ordered) / np.bincount(group))[group]
    gains = np.empty(len(order))
    gains[order] = ordered
    discounts = 1 / np.log2(np.arange(2, 2 + min(first, len(order))))
    ranked = np.argsort(-scores, kind="stable")[: len(discounts)]
    return float(gains[ranked] @ discounts / (ordered[: len(discounts)] @ discounts))
