"""Cached outputs with their facts, and the bytes in which a tier stores one of them.

A value is `checksum <u4 | FORMAT 4 bytes | dims <u4 | tokens <i4 | computed_s <f8 | image IMAGE |
vector <f4 × dims`, little endian; computed_s is Unix time. The checksum is the CRC-32 of the key
and the rest, so that it also detects a value under a wrong key.

The matrix of an output without a fixed size, such as a text's multi-vectors, is stored as a vector:
its rows one after the other, behind its shape as two numbers, which float32 holds exactly.
"""

from __future__ import annotations

import functools
import struct
import time
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halimede.providers.base import ragged
from halimede.results import IMAGE
from halimede_ops.errors import InvalidInput

FORMAT = b"hlv2"
FLOAT_BYTES = 4
DIMS_AT, COMPUTED_AT = 8, 16
"""Where `dims` and `computed_s` begin in a value."""
LAYOUTS = 256
"""Layouts that are kept: matrices have many lengths."""


class Entries(NamedTuple):
    """Vectors, or matrices, and the facts of their items, in order."""

    vectors: np.ndarray
    """`[rows, dims]` float32. Of an output without a fixed size `[rows]` object: a float32 matrix
    for each row."""
    tokens: np.ndarray
    """`[rows]` int32: tokens of each text before truncation."""
    images: np.ndarray | None = None
    """`[rows]` of IMAGE; None for texts."""


class Expect(NamedTuple):
    """Requirements on the entries of one call."""

    dims: int | None
    """Length of each vector. None: each entry is a matrix, of any shape."""
    max_age_s: float | None = None
    """Entries computed longer ago are computed again, whatever the tier's time to live."""


@functools.lru_cache(LAYOUTS)
def record(dims: int) -> np.dtype:
    """The layout of one value, as a structured dtype."""
    return np.dtype(
        [
            ("checksum", "<u4"),
            ("format", "S4"),
            ("dims", "<u4"),
            ("tokens", "<i4"),
            ("computed_s", "<f8"),
            ("image", IMAGE),
            ("vector", "<f4", (dims,)),
        ]
    )


def pack(keys: Sequence[bytes], entries: Entries) -> list[bytes]:
    """Return each entry as the bytes that a tier stores, in order."""
    if entries.vectors.dtype == np.object_:
        return [
            pack([key], Entries(_flat(matrix)[None], entries.tokens[row : row + 1]))[0]
            for row, (key, matrix) in enumerate(zip(keys, entries.vectors, strict=True))
        ]
    rows, dims = entries.vectors.shape
    records = np.zeros(rows, record(dims))
    records["format"], records["dims"], records["computed_s"] = FORMAT, dims, time.time()
    records["tokens"], records["vector"] = entries.tokens, entries.vectors
    if entries.images is not None:
        records["image"] = entries.images
    size_bytes, packed = records.dtype.itemsize, records.tobytes()
    values = []
    for row, key in enumerate(keys):
        body = packed[row * size_bytes + 4 : (row + 1) * size_bytes]
        values.append(_checksum(key, body) + body)
    return values


def unpack(values: Sequence[bytes], expect: Expect) -> Entries:
    """Return the entries of intact values, in order, as new arrays.

    Raises:
        InvalidInput: the values have other dims.
    """
    if expect.dims is None:
        each = [unpack([value], Expect(_dims(value))) for value in values]
        return Entries(
            ragged([_matrix(entry.vectors[0]) for entry in each]),
            np.array([entry.tokens[0] for entry in each], np.int32),
        )
    joined, layout = b"".join(values), record(expect.dims)
    records = np.frombuffer(joined, layout, len(joined) // layout.itemsize)
    if len(records) != len(values) or (records["dims"] != expect.dims).any():
        raise InvalidInput(
            f"the keys belong to vectors of other dims than {expect.dims}. "
            "Give `keys` and `Expect` the same dims."
        )
    return Entries(
        records["vector"].astype(np.float32),
        records["tokens"].astype(np.int32),
        records["image"].copy(),
    )


def is_intact(key: bytes, value: object, expect: Expect) -> bool:
    """Whether a value is undamaged, has this format and these dims, and belongs to this key."""
    return (
        isinstance(value, bytes)
        and len(value) >= record(0).itemsize
        and len(value) == record(0).itemsize + FLOAT_BYTES * _dims(value)
        and expect.dims in (None, _dims(value))
        and value[4:8] == FORMAT
        and value[:4] == _checksum(key, value[4:])
    )


def is_fresh(value: bytes, expect: Expect) -> bool:
    """Whether an intact value is at most `max_age_s` old."""
    if expect.max_age_s is None:
        return True
    computed_s: float = struct.unpack_from("<d", value, COMPUTED_AT)[0]
    return time.time() - computed_s <= expect.max_age_s


def check(entries: Entries, rows: int, expect: Expect) -> Entries:
    """Return the entries after checking their shapes: vectors `[rows, dims]`, or matrices `[rows]`,
    and tokens `[rows]`.

    Raises:
        InvalidInput: they have other shapes.
    """
    shapes = (np.shape(entries.vectors), np.shape(entries.tokens))
    expected = (rows,) if expect.dims is None else (rows, expect.dims)
    if shapes != (expected, (rows,)):
        raise InvalidInput(
            f"compute returned vectors {shapes[0]} and tokens {shapes[1]} for {rows} items of "
            f"{expect.dims} dims. Return one row for each item."
        )
    return entries


def are_finite(entries: Entries) -> np.ndarray:
    """`[rows]` bool: whether each entry has neither NaN nor infinity."""
    if entries.vectors.ndim == 2:
        return np.isfinite(entries.vectors).all(axis=1)
    return np.array([np.isfinite(values).all() for values in entries.vectors], np.bool_)


def _flat(matrix: np.ndarray) -> np.ndarray:
    """A matrix as a vector: its shape, then its rows."""
    return np.concatenate([np.array(matrix.shape, np.float32), matrix.reshape(-1)])


def _matrix(flat: np.ndarray) -> np.ndarray:
    """The matrix that `_flat` made a vector of."""
    return flat[2:].reshape(flat[:2].astype(np.int64))


def _dims(value: bytes) -> int:
    """Length of the vector in a value."""
    dims: int = struct.unpack_from("<I", value, DIMS_AT)[0]
    return dims


def _checksum(key: bytes, body: bytes) -> bytes:
    return zlib.crc32(body, zlib.crc32(key)).to_bytes(4, "little")
