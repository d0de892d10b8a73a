"""Embeddings in the output types of sentence-transformers, and their similarity in each type.

| output type | components | from a float `x` |
|---|---|---|
| float32, float16 | dims | `x`, rounded |
| uint8 | dims | `floor((x − low) / step)`, step = (high − low) / 255, clipped to 0 … 255 |
| int8 | dims | uint8 − 128 |
| ubinary | dims / 8, rounded up | bit 1 if x > 0; the first component is the highest bit |
| binary | dims / 8, rounded up | ubinary − 128 |

The results equal `sentence_transformers.util.quantization.quantize_embeddings`, which has no
float16.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from halimede_ops.errors import InvalidInput
from halimede_ops.vectors import normalise

OutputType = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
OUTPUT_TYPES: tuple[OutputType, ...] = get_args(OutputType)
DTYPES: dict[OutputType, type] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
    "binary": np.int8,
    "ubinary": np.uint8,
}


def quantise(
    vectors: np.ndarray, output_type: OutputType, ranges: np.ndarray | None = None
) -> np.ndarray:
    """Convert embeddings to an output type: `[batch, dims]` → `[batch, components]`, table above.

    Args:
        vectors: embeddings `[batch, dims]` of a float dtype, finite.
        output_type: one of OUTPUT_TYPES.
        ranges: `[2, dims]`, lowest and highest value of each component over many embeddings
            (`measure_ranges`), for int8 and uint8. None measures `vectors` themselves, as
            sentence-transformers does. The vector of a text then depends on the other texts of
            the call, and vectors of two calls must not be compared.

    Raises:
        InvalidInput: the output type is unknown, `vectors` is no float matrix, or `ranges` has
            another shape.
    """
    _check_type(output_type)
    _check_floats(vectors)
    if output_type in ("float32", "float16"):
        return vectors.astype(DTYPES[output_type])
    if output_type in ("int8", "uint8"):
        return _to_buckets(vectors, output_type, ranges)
    bits = np.packbits(vectors > 0, axis=-1)
    return bits if output_type == "ubinary" else _shifted(bits)


def measure_ranges(vectors: np.ndarray) -> np.ndarray:
    """Lowest and highest value of each component: `[batch, dims]` float → `[2, dims]`.

    Raises:
        InvalidInput: there are no vectors, or `vectors` is no float matrix.
    """
    _check_floats(vectors)
    if not len(vectors):
        raise InvalidInput("there are no vectors to measure ranges of. Give a hundred or more.")
    return np.vstack((vectors.min(axis=0), vectors.max(axis=0)))


def similarity(
    a: np.ndarray, b: np.ndarray, output_type: OutputType, ranges: np.ndarray | None = None
) -> np.ndarray:
    """Similarity of each row of `a` to each row of `b`, -1 … 1: `[n, m]` float32.

    - float32, float16: cosine.
    - int8, uint8: cosine of the middles of the buckets. With `ranges`, the middles are in the units
      of the floats, else in the units of the buckets.
    - binary, ubinary: 1 − 2 · Hamming distance / bits, which is the cosine of the signs. If dims is
      no multiple of 8, the bits that fill the last byte count as equal.

    Args:
        a: `[n, components]` of the output type's dtype.
        b: `[m, components]` of the output type's dtype.
        output_type: one of OUTPUT_TYPES.
        ranges: `[2, dims]` that int8 or uint8 vectors were quantised with.

    Raises:
        InvalidInput: the output type is unknown, or dtypes or numbers of components differ.
    """
    _check_type(output_type)
    for matrix in (a, b):
        _check_quantised(matrix, output_type)
    if a.shape[1] != b.shape[1]:
        raise InvalidInput(
            f"vectors have {a.shape[1]} and {b.shape[1]} components. Compare vectors of one space."
        )
    return _unit(a, output_type, ranges) @ _unit(b, output_type, ranges).T


def _unit(vectors: np.ndarray, output_type: OutputType, ranges: np.ndarray | None) -> np.ndarray:
    """Float32 vectors of norm 1 whose scalar product is the similarity: `[batch, width]`."""
    if output_type in ("binary", "ubinary"):
        return normalise(_signs(vectors))
    if output_type in ("int8", "uint8"):
        return normalise(_middles(vectors, ranges))
    return normalise(vectors.astype(np.float32))


def _to_buckets(
    vectors: np.ndarray, output_type: OutputType, ranges: np.ndarray | None
) -> np.ndarray:
    if not len(vectors):
        return np.empty(vectors.shape, DTYPES[output_type])
    low, step = _buckets(measure_ranges(vectors) if ranges is None else ranges, vectors.shape[1])
    buckets = np.clip(np.floor((vectors - low) / step), 0, 255).astype(np.uint8)
    return buckets if output_type == "uint8" else _shifted(buckets)


def _buckets(ranges: np.ndarray, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest value and width of each component's 256 buckets; width 1 if all values are equal."""
    if np.shape(ranges) != (2, dims):
        raise InvalidInput(f"ranges are {np.shape(ranges)}; {dims} components need (2, {dims}).")
    step = (ranges[1] - ranges[0]) / 255
    return ranges[0], np.where(step == 0, 1, step)


def _middles(vectors: np.ndarray, ranges: np.ndarray | None) -> np.ndarray:
    """The float in the middle of each bucket. Without ranges, buckets are 1 wide around 0."""
    buckets = vectors.astype(np.float32) + (128 if vectors.dtype == np.int8 else 0)
    if ranges is None:
        return buckets - np.float32(127.5)
    low, step = _buckets(ranges, vectors.shape[1])
    return (low + (buckets + 0.5) * step).astype(np.float32)


def _signs(packed: np.ndarray) -> np.ndarray:
    """Each bit as −1 or 1, float32."""
    bits = packed if packed.dtype == np.uint8 else _shifted(packed)
    return np.unpackbits(bits.view(np.uint8), axis=1).astype(np.float32) * 2 - 1


def _shifted(values: np.ndarray) -> np.ndarray:
    """Convert unsigned bytes to signed ones, and back, by 128: flips the highest bit."""
    other = np.int8 if values.dtype == np.uint8 else np.uint8
    return (values.view(np.uint8) ^ np.uint8(128)).view(other)


def _check_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise InvalidInput(f"no such output type; use one of {', '.join(OUTPUT_TYPES)}.")


def _check_floats(vectors: np.ndarray) -> None:
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InvalidInput(
            f"vectors are {vectors.dtype} {vectors.shape}; give floats of [batch, dims]. "
            "Quantised vectors cannot be quantised again."
        )


def _check_quantised(vectors: np.ndarray, output_type: OutputType) -> None:
    if vectors.ndim != 2 or vectors.dtype != DTYPES[output_type]:
        raise InvalidInput(
            f"vectors are {vectors.dtype} {vectors.shape}; {output_type} is "
            f"{np.dtype(DTYPES[output_type])} [batch, components]."
        )
