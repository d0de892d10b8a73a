"""Rows of different lengths as rectangles: pad, trim, and cut into micro-batches."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import numpy as np

LENGTH_MULTIPLE = 16
"""Most rows are padded to a multiple of this: OpenVINO prepares kernels per shape and keeps them,
0.6 MB of the default model in FP32 and 3 to 4 in INT8, so few shapes."""
INTERACTIVE_ROWS = 8
"""Rows of the largest request of the interactive lane; larger ones are bulk."""
PACKED_TOKENS = 64
"""Texts packed into one row fill it up to a multiple of this: attention costs by the row's length,
and more texts find their place in longer rows."""
MICRO_BATCH_TOKENS = 512
"""Most padded tokens in one run. Measured on 2 cores: 256 to 1024 are alike, 2048 is slower."""
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
    return _padded(tokens, LENGTH_MULTIPLE, most)


def near_length(tokens: int, most: int | None = None) -> int:
    """As `padded_length`, but an eighth or one token more at most: 40 lengths up to 256."""
    eighth = 1 << max(1, (tokens - 1).bit_length() - 4)
    return _padded(tokens, min(eighth, LENGTH_MULTIPLE), most)


def packed_length(tokens: int) -> int:
    """As `padded_length`, for several rows of several texts: a multiple of PACKED_TOKENS, as nearly
    all of them fill.
    """
    return _rounded_up(max(1, tokens), PACKED_TOKENS)


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of `lengths` by the row that each shares with others, fullest use of rows first.

    A text goes to the row that it fills best; where none has room, a row as long as the text,
    rounded up to PACKED_TOKENS, is begun. A text without tokens has a row to itself.
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
            free, row = _rounded_up(length, PACKED_TOKENS), len(rows)
            rows.append([index])
        bisect.insort(room, (free - length, row))
    return rows


def plan_packed(
    lengths: Sequence[int], streams: int = 1, most_tokens: int = MICRO_BATCH_TOKENS
) -> list[list[int]]:
    """As `plan`, for a model that takes several texts a row."""
    rows = pack(lengths)
    sums = [sum(lengths[index] for index in row) for row in rows]
    parts = plan(sums, streams, most_tokens, packed_length)
    return [[index for row in part for index in rows[row]] for part in parts]


def plan(
    lengths: Sequence[int],
    streams: int = 1,
    most_tokens: int = MICRO_BATCH_TOKENS,
    together: Callable[[int], int] = padded_length,
) -> list[list[int]]:
    """Indices of `lengths` in the micro-batches that cost least, longest rows first.

    A micro-batch costs RUN_TOKENS for the run, its padded tokens (`together` gives those of a row
    for the longest's), and a little more the larger it is, so that those that run in `streams` at
    the same time are alike. Rows are taken in order of length, and the cuts between micro-batches
    are chosen by dynamic programming. With other `most_tokens` of a run, its other costs are in
    proportion.
    """
    scale = most_tokens / MICRO_BATCH_TOKENS
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    alone = [padded_length(lengths[index]) for index in order]
    padded = [together(lengths[index]) for index in order]
    most = _share(sum(alone), streams, most_tokens, UNSHARED_TOKENS * scale)
    cost = [0.0] * (len(order) + 1)
    """Least cost of the first rows."""
    start = [0] * (len(order) + 1)
    """Where the last micro-batch of the first rows begins."""
    for end in range(1, len(order) + 1):
        cost[end] = math.inf
        for first in range(end - 1, -1, -1):
            rows = end - first
            tokens = padded[first] * rows if rows > 1 else alone[first]
            if tokens > most and rows > 1:
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
    return _rounded_up(share, PACKED_TOKENS)


def _padded(tokens: int, multiple: int, most: int | None) -> int:
    rounded = _rounded_up(max(1, tokens), multiple)
    return rounded if most is None else max(tokens, min(rounded, most))


def _rounded_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple
