"""STS: how well a model ranks sentence pairs by similarity."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from halimede_ops import vectors
from halimede_ops.errors import InvalidInput


def spearman(file: Path, embed: Callable[[Sequence[str]], np.ndarray]) -> float:
    """Spearman correlation ×100 of cosine similarity with the scores of an STS file.

    The file is tab-separated with the columns score, sentence1 and sentence2. `embed` gives the
    vectors `[texts, dims]` of texts.

    Raises:
        InvalidInput: the file cannot be read or lacks a column.
    """
    from scipy.stats import spearmanr

    scores, first, second = _read(file)
    cosines = vectors.cosine(embed(first), embed(second))
    return float(100 * np.float64(spearmanr(cosines, scores).statistic))


def sentences(file: Path) -> list[str]:
    """All sentences of an STS file.

    Raises:
        InvalidInput: the file cannot be read or lacks a column.
    """
    _, first, second = _read(file)
    return first + second


def _read(file: Path) -> tuple[list[float], list[str], list[str]]:
    """The scores, and the first and second sentences."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        scores = [float(row["score"]) for row in rows]
        first, second = ([row[name] for row in rows] for name in ("sentence1", "sentence2"))
    except (OSError, KeyError, ValueError) as error:
        raise InvalidInput(
            "the STS file cannot be read; it must be tab-separated with the columns score, "
            f"sentence1 and sentence2 ({type(error).__name__})"
        ) from None
    return scores, first, second
