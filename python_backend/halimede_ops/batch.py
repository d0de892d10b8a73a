"""Rows of different lengths as rectangles: pad, trim, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

LENGTH_MULTIPLE = 16
"""Rows are padded to a multiple of this: OpenVINO prepares kernels per shape, so few shapes."""
MICRO_BATCH_TOKENS = 512
"""Most padded tokens in one run. Measured on 2 cores: 256 to 1024 are alike, 2048 is slower."""


def pad(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """Rows as one matrix `[len(rows), length]` int64, zeros on the right."""
    matrix = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def mask(lengths: Sequence[int], length: int) -> np.ndarray:
    """Attention mask `[len(lengths), length]` int64: 1 on each row's first tokens."""
    return (np.arange(length) < np.asarray(lengths)[:, None]).astype(np.int64)


def used_lengths(mask: np.ndarray) -> np.ndarray:
    """Each row's length up to its last 1: `[batch, tokens]` → `[batch]` int64; all masked: 0."""
    reversed_mask = mask[:, ::-1] != 0
    return np.where(reversed_mask.any(axis=1), mask.shape[1] - reversed_mask.argmax(axis=1), 0)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """Smallest of the ascending `buckets` that holds `length`; the last if none does."""
    return next((size for size in buckets if size >= length), buckets[-1])


def padded_length(tokens: int) -> int:
    """`tokens` rounded up to a multiple of LENGTH_MULTIPLE, at least one multiple."""
    return max(1, -(-tokens // LENGTH_MULTIPLE)) * LENGTH_MULTIPLE


def plan(lengths: Sequence[int], budget: int = MICRO_BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of `lengths` in micro-batches: longest first, each within `budget` padded tokens.

    A row longer than the budget runs alone.
    """
    part: list[int] = []
    part_length = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if part and part_length * (len(part) + 1) > budget:
            yield part
            part = []
        if not part:
            part_length = padded_length(lengths[index])
        part.append(index)
    if part:
        yield part
