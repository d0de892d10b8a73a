"""Rows of different lengths as rectangles: pad, trim, and cut into micro-batches."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

LENGTH_MULTIPLE = 16
"""Rows are padded to a multiple of this: OpenVINO prepares kernels per shape, so few shapes."""
INTERACTIVE_ROWS = 8
"""Rows of the largest request of the interactive lane; larger ones are bulk."""
SHARED_MULTIPLE = 64
"""Of many texts, those that share rows fill them up to a multiple of this."""
LONGEST_SHARED = 256
"""Texts share rows of at most so many tokens, or as many as the longest text has."""
MOST_ROWS_A_TOKEN = 0.5
"""Shared rows are at most so many for each token of their length: OpenVINO 2025.4 gives wrong
vectors for more rows than their length, where every pair of tokens has its own mask."""
ATTENTION_TOKENS = 700
"""Length of a row whose attention costs as much as all else: measured with OpenVINO in INT8."""
MICRO_BATCH_TOKENS = 768
"""Most padded tokens in one run. Measured on 2 cores: 512 to 1024 are alike, 2048 is slower."""
UNSHARED_TOKENS = 128
"""Padded tokens that are not worth two runs at the same time."""
UNEVENNESS = 8192
"""Tokens squared over this are what a micro-batch costs beyond its tokens."""
RUN_TOKENS = 48
"""What starting one run costs, in tokens. Measured with OpenVINO in INT8 on one core of a 2.8 GHz
Xeon: a run costs 1.5 ms, 1 to 3 ms more when its shape is not the last one's, and 0.12 ms a token.
Over random groups of 8 texts, 48 takes 14 % less CPU than 16 in INT8 and 11 % less in FP32."""


def pad(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """Rows as one matrix `[len(rows), length]` int64, zeros on the right."""
    matrix = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def pad_heads(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows `[tokens, width]` as one array `[len(rows), tokens of the longest, width]` float32."""
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


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


def padded_length(tokens: int, most: int | None = None) -> int:
    """`tokens` rounded up to a multiple of LENGTH_MULTIPLE, at least one; `most` is the limit."""
    rounded = max(1, -(-tokens // LENGTH_MULTIPLE)) * LENGTH_MULTIPLE
    return rounded if most is None else max(tokens, min(rounded, most))


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of `lengths` by the row that each shares with others, in rows of the one length that
    costs least: longer ones are better filled, but attention costs by the row's length. A text
    without tokens has a row to itself.
    """
    total = sum(lengths)
    best: list[list[int]] = []
    least = math.inf
    shortest = padded_length(max(lengths, default=0))
    for length in range(shortest, max(shortest, LONGEST_SHARED) + 1, LENGTH_MULTIPLE):
        if _price(total, length) >= least:
            break  # even with no token free
        rows = _fill(lengths, partial(max, length))
        used = padded_length(max((sum(lengths[one] for one in row) for row in rows), default=0))
        price = _price(len(rows) * used, used)
        if price < least and len(rows) <= used * MOST_ROWS_A_TOKEN:
            best, least = rows, price
    return best or rows


def plan_packed(
    lengths: Sequence[int], streams: int = 1, most_tokens: int = MICRO_BATCH_TOKENS
) -> list[list[int]]:
    """As `plan`, for a model that takes several texts a row."""
    if streams == 1 and 0 < sum(lengths) <= most_tokens:
        return [list(range(len(lengths)))]
    # Short texts fill the rows that long ones need; then rows of like length run together.
    rows = _fill(lengths, lambda length: -(-length // SHARED_MULTIPLE) * SHARED_MULTIPLE)
    parts = plan([sum(lengths[index] for index in row) for row in rows], streams, most_tokens)
    return [[index for row in part for index in rows[row]] for part in parts]


def _price(tokens: int, length: int) -> float:
    """What tokens cost in rows of this length."""
    return tokens * (1 + length / ATTENTION_TOKENS)


def _fill(lengths: Sequence[int], row_length: Callable[[int], int]) -> list[list[int]]:
    """Indices of `lengths` by row: each, the longest first, goes to the row that it fills best;
    where none has room, one is begun, as long as `row_length` says for it.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """Free tokens and index of each row, ascending."""
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, 0))
        if length and place < len(room):
            free, row = room.pop(place)
            rows[row].append(index)
        else:
            free, row = row_length(length), len(rows)
            rows.append([index])
        bisect.insort(room, (free - length, row))
    return rows


def plan(
    lengths: Sequence[int], streams: int = 1, most_tokens: int = MICRO_BATCH_TOKENS
) -> list[list[int]]:
    """Indices of `lengths` in the micro-batches that cost least, longest rows first.

    A micro-batch costs RUN_TOKENS for the run, its padded tokens, and a little more the larger it
    is, so that those that run in `streams` at the same time are alike. Rows are taken in order of
    length, and the cuts between micro-batches are chosen by dynamic programming. With other
    `most_tokens` of a run, its other costs are in proportion.
    """
    scale = most_tokens / MICRO_BATCH_TOKENS
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [padded_length(lengths[index]) for index in order]
    most = _share(sum(padded), streams, most_tokens, UNSHARED_TOKENS * scale)
    cost = [0.0] * (len(order) + 1)
    """Least cost of the first rows."""
    start = [0] * (len(order) + 1)
    """Where the last micro-batch of the first rows begins."""
    for end in range(1, len(order) + 1):
        cost[end] = math.inf
        for first in range(end - 1, -1, -1):
            tokens = padded[first] * (end - first)
            if tokens > most and end - first > 1:
                break
            price = cost[first] + RUN_TOKENS * scale + tokens + tokens**2 / (UNEVENNESS * scale)
            if price < cost[end]:
                cost[end] = price
                start[end] = first
    parts = []
    end = len(order)
    while end:
        parts.append(order[start[end] : end])
        end = start[end]
    return parts[::-1]


def _share(tokens: int, streams: int, most_tokens: int, unshared_tokens: float) -> int:
    """Most tokens of a micro-batch, such that every stream gets as many of them."""
    if tokens <= unshared_tokens:
        return tokens
    rounds = -(-tokens // (most_tokens * streams))
    share = -(-tokens // (rounds * streams))
    return padded_length(share)
