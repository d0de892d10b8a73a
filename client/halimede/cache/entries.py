"""Vectors with what is told of their items, and the bytes that stand for one of them in a tier.

A value is `checksum <u4 | FORMAT 4 bytes | dims <u4 | tokens <i4 | computed_s <f8 | image IMAGE |
vector <f4 × dims`, little endian; computed_s is Unix time. The checksum is the CRC-32 of key and
the rest, so a value under a wrong key is found too.
"""

from __future__ import annotations

import functools
import struct
import time
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halimede.results import IMAGE
from halimede_ops.errors import InvalidInput

FORMAT = b"hlv2"


class Entries(NamedTuple):
    """Vectors of items, in their order."""

    vectors: np.ndarray
    """`[rows, dims]` float32."""
    tokens: np.ndarray
    """`[rows]` int32: tokens of each whole text."""
    images: np.ndarray | None = None
    """`[rows]` of IMAGE; None: of texts."""


class Expect(NamedTuple):
    """What the entries of one call must be."""

    dims: int
    max_age_s: float | None = None
    """Seconds since it was computed after which a vector is not wanted any more, in no tier."""


@functools.cache
def record(dims: int) -> np.dtype:
    """The layout of one value."""
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
    """Each entry's value, in order."""
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
    """The entries of intact values, in order; the arrays are the caller's own.

    Raises:
        InvalidInput: the values are of other dims.
    """
    joined, layout = b"".join(values), record(expect.dims)
    records = np.frombuffer(joined, layout, len(joined) // layout.itemsize)
    if len(records) != len(values) or (records["dims"] != expect.dims).any():
        raise InvalidInput(
            f"the keys are of vectors of other dims than {expect.dims}. "
            "Give keys and Expect the same dims."
        )
    return Entries(
        records["vector"].astype(np.float32),
        records["tokens"].astype(np.int32),
        records["image"].copy(),
    )


def is_intact(key: bytes, value: object, expect: Expect) -> bool:
    """Whether a value is whole, of this format, of these dims and was stored under this key."""
    return (
        isinstance(value, bytes)
        and len(value) == record(expect.dims).itemsize
        and value[4:8] == FORMAT
        and value[:4] == _checksum(key, value[4:])
    )


def is_fresh(value: bytes, expect: Expect) -> bool:
    """Whether an intact value is young enough."""
    if expect.max_age_s is None:
        return True
    computed_s: float = struct.unpack_from("<d", value, 16)[0]
    return time.time() - computed_s <= expect.max_age_s


def check(entries: Entries, rows: int, expect: Expect) -> Entries:
    """The entries, if they are `[rows, dims]` and `[rows]`.

    Raises:
        InvalidInput: they are not.
    """
    shapes = (np.shape(entries.vectors), np.shape(entries.tokens))
    if shapes != ((rows, expect.dims), (rows,)):
        raise InvalidInput(
            f"compute gave vectors {shapes[0]} and tokens {shapes[1]} for {rows} items of "
            f"{expect.dims} dims. Give one row an item."
        )
    return entries


def _checksum(key: bytes, body: bytes) -> bytes:
    return zlib.crc32(body, zlib.crc32(key)).to_bytes(4, "little")
