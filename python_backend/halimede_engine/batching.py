"""Rows of different lengths as rectangular arrays: pad, pack, and split into micro-batches."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import numpy as np

LENGTH_MULTIPLE = 16
"""Rows are padded to a multiple of this, which keeps the number of shapes small. OpenVINO compiles
kernels for each shape and keeps them: 0.6 MB for the default model in FP32, 3 to 4 MB in INT8."""
INTERACTIVE_ROWS = 8
"""Rows of the largest interactive request; larger requests are bulk."""
INTERACTIVE_BYTES = 16 * 1024
"""Bytes of text of the largest interactive request: tokenizing them takes 4 to 8 ms."""
INTERACTIVE_TOKENS = 2048
"""Tokens of the largest interactive request, after truncation."""
SHORT_TOKENS = 64
"""Tokens of the largest request that does not wait for longer ones: a run takes 4 to 8 ms."""
URGENT_TOKENS = 256
"""Tokens of the largest request that does not wait for bulk: a run takes 10 to 40 ms."""
PACKED_TOKENS = 64
"""Packed rows are padded to a multiple of this. Longer rows would hold more texts, but attention
costs grow with the length of the row."""
MICRO_BATCH_TOKENS = 512
"""Maximum padded tokens of one micro-batch. Measured on 2 cores: 256 to 1024 perform alike, 2048 is
slower."""
UNSHARED_TOKENS = 128
"""Fewer padded tokens than this are not divided between streams."""
UNEVENNESS = 8192
"""A micro-batch of n tokens costs n² / UNEVENNESS more than n, which favours equal sizes."""
RUN_TOKENS = 48
"""Cost of starting one run, in tokens. Measured with OpenVINO in INT8 on one core of a 2.8 GHz
Xeon: a run costs 1.5 ms, 1 to 3 ms more if its shape differs from the last one's, and 0.12 ms a
token. Over random groups of 8 texts, 48 takes 14 % less CPU than 16 in INT8 and 11 % less in
FP32."""


def is_bulk(rows: int, size_bytes: int = 0, tokens: int = 0) -> bool:
    """Whether a request with this many rows, bytes of text and tokens is bulk.

    Other requests, interactive ones, do not wait for bulk. Bytes and tokens count where known.
    """
    return rows > INTERACTIVE_ROWS or size_bytes > INTERACTIVE_BYTES or tokens > INTERACTIVE_TOKENS


def pad(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """Pad rows of token ids with zeros on the right: `[len(rows), length]` int64."""
    matrix = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def pad_heads(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pad rows `[tokens, width]` with zeros: `[len(rows), longest, width]` float32."""
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def mask(lengths: Sequence[int], length: int) -> np.ndarray:
    """Attention mask `[len(lengths), length]` int64: 1 for the tokens of each row, then 0."""
    return (np.arange(length) < np.asarray(lengths)[:, None]).astype(np.int64)


def attention(length: int, unattended: int = 0) -> np.ndarray:
    """Attention mask of one row without padding, `[length]` int64: 1 for each token, -1 for the
    last `unattended` ones, which no token attends to.
    """
    values = np.ones(length, np.int64)
    values[length - unattended :] = -1
    return values


def used_lengths(mask: np.ndarray) -> np.ndarray:
    """Length of each row up to its last token: `[batch, tokens]` → `[batch]` int64; else 0."""
    reversed_mask = mask[:, ::-1] != 0
    return np.where(reversed_mask.any(axis=1), mask.shape[1] - reversed_mask.argmax(axis=1), 0)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that is at least `length`, else the last."""
    return next((size for size in buckets if size >= length), buckets[-1])


def padded_length(tokens: int, max_length: int | None = None) -> int:
    """Round `tokens` up to a positive multiple of LENGTH_MULTIPLE, limited to `max_length`."""
    return _padded(tokens, LENGTH_MULTIPLE, max_length)


def tight_length(tokens: int, max_length: int | None = None) -> int:
    """As `padded_length`, with at most an eighth or one token of padding; 40 lengths up to 256."""
    eighth = 1 << max(1, (tokens - 1).bit_length() - 4)
    return _padded(tokens, min(eighth, LENGTH_MULTIPLE), max_length)


def packed_length(tokens: int) -> int:
    """Round `tokens` up to a positive multiple of PACKED_TOKENS: the length of packed rows."""
    return _rounded_up(max(1, tokens), PACKED_TOKENS)


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Pack texts into rows: for each row the indices of its texts in `lengths`.

    Best-fit decreasing: texts are placed from the longest to the shortest, each into the row that
    it leaves with the least free tokens. If no row has room, a new row starts, as long as the text
    rounded up to PACKED_TOKENS. A text without tokens gets a row of its own.
    """
    rows: list[list[int]] = []
    free_rows: list[tuple[int, int]] = []
    """Free tokens and index of each row, ascending."""
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        best = bisect.bisect_left(free_rows, (length, 0))
        if length and best < len(free_rows):
            free, row = free_rows.pop(best)
            rows[row].append(index)
        else:
            free, row = _rounded_up(length, PACKED_TOKENS), len(rows)
            rows.append([index])
        bisect.insort(free_rows, (free - length, row))
    return rows


def plan_packed(
    lengths: Sequence[int], streams: int = 1, max_tokens: int = MICRO_BATCH_TOKENS
) -> list[list[int]]:
    """As `plan`, for a model that takes packed rows."""
    rows = pack(lengths)
    row_lengths = [sum(lengths[index] for index in row) for row in rows]
    micro_batches = plan(row_lengths, streams, max_tokens, packed_length)
    return [[index for row in part for index in rows[row]] for part in micro_batches]


def plan(
    lengths: Sequence[int],
    streams: int = 1,
    max_tokens: int = MICRO_BATCH_TOKENS,
    batch_length: Callable[[int], int] = padded_length,
) -> list[list[int]]:
    """Split rows into the cheapest micro-batches: indices of `lengths`, longest rows first.

    The rows are sorted by length; dynamic programming chooses where one micro-batch ends and the
    next begins. A micro-batch costs RUN_TOKENS, its padded tokens, and a part that grows with its
    square (UNEVENNESS), so that micro-batches that run at the same time are of similar size. If
    `max_tokens` differs from MICRO_BATCH_TOKENS, the other costs scale with it.

    Args:
        lengths: tokens of each row.
        streams: micro-batches that run at the same time.
        max_tokens: maximum padded tokens of a micro-batch of several rows.
        batch_length: padded length of every row in a micro-batch of several, given the longest.
    """
    scale = max_tokens / MICRO_BATCH_TOKENS
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    alone = [padded_length(lengths[index]) for index in order]
    padded = [batch_length(lengths[index]) for index in order]
    limit = _share(sum(alone), streams, max_tokens, UNSHARED_TOKENS * scale)
    cost = [0.0] * (len(order) + 1)
    """`cost[n]`: least cost of the first n rows."""
    start = [0] * (len(order) + 1)
    """`start[n]`: first row of the last micro-batch among the first n rows."""
    for end in range(1, len(order) + 1):
        cost[end] = math.inf
        for first in range(end - 1, -1, -1):
            rows = end - first
            tokens = padded[first] * rows if rows > 1 else alone[first]
            if tokens > limit and rows > 1:
                break
            total = cost[first] + RUN_TOKENS * scale + tokens + tokens**2 / (UNEVENNESS * scale)
            if total < cost[end]:
                cost[end] = total
                start[end] = first
    micro_batches = []
    end = len(order)
    while end:
        micro_batches.append(order[start[end] : end])
        end = start[end]
    return micro_batches[::-1]


def _share(tokens: int, streams: int, max_tokens: int, unshared_tokens: float) -> int:
    """Maximum tokens of a micro-batch that gives every stream the same share of `tokens`."""
    if tokens <= unshared_tokens:
        return tokens
    rounds = -(-tokens // (max_tokens * streams))
    share = -(-tokens // (rounds * streams))
    return _rounded_up(share, PACKED_TOKENS)


def _padded(tokens: int, multiple: int, max_length: int | None) -> int:
    rounded = _rounded_up(max(1, tokens), multiple)
    return rounded if max_length is None else max(tokens, min(rounded, max_length))


def _rounded_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple
