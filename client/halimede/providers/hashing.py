"""Local hash embeddings: the same text gives the same vector everywhere, another text another.

They carry no meaning: two different texts are about orthogonal (cosine 0 ± dims ** -0.5). They
need no model and no server, for development, tests and as the last resort of a chain.

A text's SHA-256 is four 64-bit numbers, little endian. Each runs a SplitMix64 generator (Steele,
Lea and Flood, OOPSLA 2014); the vector's bytes are the first output of each, then the second of
each, and so on, little endian. A component is 2 · byte − 255, divided by the vector's norm. Every
step is an exact integer or one correctly rounded operation of IEEE 754, so the bits of a vector
are the same on every platform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from halimede_ops.errors import InvalidDimensions

LEAST_DIMS, MOST_DIMS = 384, 3072
VERSION = 1
"""Raised when a text's vector changes: vectors of another version are of another space."""

BLOCK_TEXTS = 256
"""Texts computed at once: their arrays stay in the processor's cache."""


def embed(texts: Sequence[bytes], dims: int = LEAST_DIMS) -> np.ndarray:
    """Hash embeddings `[texts, dims]` float32 of L2 norm 1.

    Args:
        texts: in UTF-8.
        dims: 384 to 3072.

    Raises:
        InvalidDimensions: `dims` lies outside.
    """
    _check(dims)
    digests = b"".join([hashlib.sha256(text).digest() for text in texts])
    seeds = np.frombuffer(digests, "<u8").reshape(len(texts), 4)
    vectors = np.empty((len(texts), dims), np.float32)
    for start in range(0, len(texts), BLOCK_TEXTS):
        block = slice(start, start + BLOCK_TEXTS)
        signed = _bytes(seeds[block], dims).astype(np.float32) * np.float32(2) - np.float32(255)
        # Sums of odd squares: never zero, and exact in float64.
        norms = np.sqrt(np.einsum("nd,nd->n", signed, signed, dtype=np.float64))
        vectors[block] = signed / norms.astype(np.float32)[:, None]
    return vectors


def space(dims: int = LEAST_DIMS) -> str:
    """Fingerprint of these vectors, 16 hex digits.

    Raises:
        InvalidDimensions: `dims` lies outside 384 … 3072.
    """
    _check(dims)
    return hashlib.sha256(f"halimede hash {VERSION} {dims}".encode()).hexdigest()[:16]


def _bytes(seeds: np.ndarray, dims: int) -> np.ndarray:
    """`[texts, dims]` uint8 from seeds `[texts, 4]` uint64."""
    rounds = np.arange(1, -(-dims // 32) + 1, dtype=np.uint64)[:, None]
    state = seeds[:, None, :] + rounds * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state.astype("<u8").reshape(len(seeds), -1).view(np.uint8)[:, :dims]


def _check(dims: int) -> None:
    if not LEAST_DIMS <= dims <= MOST_DIMS:
        raise InvalidDimensions(
            f"dimensions is {dims}; hash embeddings have {LEAST_DIMS} to {MOST_DIMS}."
        )
