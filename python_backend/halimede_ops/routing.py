"""Which tower of a model embeds which text, and the towers' answers in the order of the texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halimede_ops.spec import ModelSpec


def rows_by_tower(spec: ModelSpec, input_types: Sequence[str | None]) -> dict[str, list[int]]:
    """The rows that each tower embeds, of texts of these input types.

    Raises:
        UnknownInputType: the model has no such input type, or needs one.
    """
    rows: dict[str, list[int]] = {}
    for row, input_type in enumerate(input_types):
        rows.setdefault(spec.tower(input_type), []).append(row)
    return rows


def merge(rows: Sequence[Sequence[int]], parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array from those of several towers, `[rows of the tower, n]` each, in order of rows."""
    merged = np.empty((sum(map(len, rows)), *parts[0].shape[1:]), parts[0].dtype)
    for places, part in zip(rows, parts, strict=True):
        merged[list(places)] = part
    return merged
