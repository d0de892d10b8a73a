"""Output types against sentence-transformers, and similarities in each."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sentence_transformers.util.quantization import quantize_embeddings

from halimede_ops.errors import InvalidInput
from halimede_ops.quantise import (
    DTYPES,
    OUTPUT_TYPES,
    OutputType,
    measure_ranges,
    quantise,
    similarity,
)
from halimede_ops.vectors import normalise

logging.getLogger("sentence_transformers").setLevel(logging.ERROR)

THEIRS = ("float32", "int8", "uint8", "binary", "ubinary")
matrices = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.tuples(st.integers(1, 6), st.integers(1, 20)),
    elements=st.floats(-2, 2, width=16),
)


def unit(rows: int, dims: int = 384, seed: int = 0) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((rows, dims)).astype(np.float32))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return normalise(a.astype(np.float64)) @ normalise(b.astype(np.float64)).T


@pytest.mark.parametrize("output_type", THEIRS)
@given(matrices)
def test_types_equal_sentence_transformers(output_type: OutputType, vectors: np.ndarray) -> None:
    """Value by value and dtype by dtype, for any float dtype and width."""
    ours, theirs = quantise(vectors, output_type), quantize_embeddings(vectors, output_type)
    assert ours.dtype == theirs.dtype == DTYPES[output_type]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("output_type", ["int8", "uint8"])
def test_ranges_equal_sentence_transformers(output_type: OutputType) -> None:
    """With ranges of calibration vectors; what lies outside is cut to the ends."""
    calibration, vectors = unit(500), unit(50, seed=1) * 3
    theirs = quantize_embeddings(vectors, output_type, calibration_embeddings=calibration)
    ranges = measure_ranges(calibration)
    np.testing.assert_array_equal(quantise(vectors, output_type, ranges), theirs)
    info = np.iinfo(DTYPES[output_type])
    assert theirs.min() == info.min and theirs.max() == info.max


def test_with_ranges_a_vector_is_independent_of_its_neighbours() -> None:
    """The same vector alone and among others is the same int8 vector."""
    vectors, ranges = unit(20), measure_ranges(unit(500, seed=1))
    alone = np.vstack([quantise(vectors[row : row + 1], "int8", ranges) for row in range(20)])
    np.testing.assert_array_equal(alone, quantise(vectors, "int8", ranges))


def test_float16_is_rounded() -> None:
    """float16 keeps a cosine of 0.999999 or more."""
    halves = quantise(unit(20), "float16")
    assert halves.dtype == np.float16
    assert np.diag(cosines(halves, unit(20))).min() > 0.999999


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
def test_no_vectors_are_no_vectors(output_type: OutputType) -> None:
    """An empty batch keeps its width and its dtype."""
    empty = quantise(np.empty((0, 16), np.float32), output_type)
    assert empty.shape == (0, 2 if output_type.endswith("binary") else 16)
    assert empty.dtype == DTYPES[output_type]
    assert similarity(empty, empty, output_type).shape == (0, 0)


# Bars: largest distance from the cosine of the floats, for random unit vectors of 384 dims.
@pytest.mark.parametrize(
    ("output_type", "bar"),
    [("float32", 1e-6), ("float16", 1e-3), ("int8", 0.01), ("uint8", 0.01)],
)
def test_similarity_is_about_the_cosine(output_type: OutputType, bar: float) -> None:
    """float, and int8 and uint8 with the ranges they were made with, stay near the cosine."""
    ranges = measure_ranges(unit(2000, seed=2))
    near = normalise(unit(8) + 0.5 * unit(8, seed=1))
    a, b = (quantise(vectors, output_type, ranges) for vectors in (unit(8), near))
    found = similarity(a, b, output_type, ranges)
    assert found.shape == (8, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found, cosines(unit(8), near), atol=bar)


def test_int8_and_uint8_are_as_alike_without_ranges() -> None:
    """Both are the same buckets: the same similarity; a vector with itself is 1."""
    vectors = unit(300)
    signed, unsigned = (quantise(vectors, name) for name in ("int8", "uint8"))
    found = similarity(signed, signed, "int8")
    np.testing.assert_allclose(found, similarity(unsigned, unsigned, "uint8"), atol=1e-6)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-6)
    assert np.corrcoef(found.ravel(), cosines(vectors, vectors).ravel())[0, 1] > 0.95


@pytest.mark.parametrize("output_type", ["binary", "ubinary"])
@given(
    bits=hnp.arrays(np.bool_, st.tuples(st.integers(2, 5), st.integers(1, 5).map(lambda n: 8 * n)))
)
def test_binary_similarity_is_the_hamming_distance(
    output_type: OutputType, bits: np.ndarray
) -> None:
    """1 − 2 · differing bits / bits, which is the cosine of the signs."""
    signs = np.where(bits, 1.0, -1.0)
    packed = quantise(signs, output_type)
    hamming = (bits[:, None] != bits[None]).sum(axis=2)
    expected = 1 - 2 * hamming / bits.shape[1]
    np.testing.assert_allclose(similarity(packed, packed, output_type), expected, atol=1e-6)
    np.testing.assert_allclose(expected, cosines(signs, signs), atol=1e-6)


def test_wrong_input_is_named() -> None:
    """Unknown types, quantised input, other shapes, dtypes, ranges and widths are refused."""
    vectors = unit(3, 16)
    with pytest.raises(InvalidInput, match="float32, float16, int8, uint8, binary, ubinary"):
        quantise(vectors, "int4")
    with pytest.raises(InvalidInput, match="float32, float16"):
        similarity(vectors, vectors, "int4")
    for wrong in (quantise(vectors, "int8"), vectors[0]):
        with pytest.raises(InvalidInput, match="give floats of"):
            quantise(wrong, "binary")
    with pytest.raises(InvalidInput, match=r"\(2, 8\); 16 components need \(2, 16\)"):
        quantise(vectors, "int8", np.zeros((2, 8)))
    with pytest.raises(InvalidInput, match="no vectors to measure"):
        measure_ranges(vectors[:0])
    with pytest.raises(InvalidInput, match="binary is int8"):
        similarity(quantise(vectors, "ubinary"), quantise(vectors, "ubinary"), "binary")
    with pytest.raises(InvalidInput, match="16 and 8 components"):
        similarity(vectors, vectors[:, :8], "float32")
