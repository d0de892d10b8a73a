"""Hash embeddings: the same everywhere, unit length, about orthogonal."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halimede.providers.hash import hash_embeddings, hash_space
from halimede_ops.errors import InvalidDimensions
from halimede_ops.vectors import cosine

MASK = 2**64 - 1


def by_the_book(text: bytes, dims: int) -> list[float]:
    """The definition in the module's docstring, one number at a time."""
    digest = hashlib.sha256(text).digest()
    states = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8)]
    stream = b""
    while len(stream) < dims:
        for lane in range(4):
            states[lane] = z = (states[lane] + 0x9E3779B97F4A7C15) & MASK
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
            stream += (z ^ (z >> 31)).to_bytes(8, "little")
    signed = np.array([2 * byte - 255 for byte in stream[:dims]], np.float32)
    return signed / np.float32(sum(int(value) ** 2 for value in signed) ** 0.5)


@given(st.lists(st.binary(max_size=50), max_size=4), st.sampled_from([384, 385, 768, 1000, 3072]))
def test_vectors_are_those_of_the_definition(texts: list[bytes], dims: int) -> None:
    """Each vector is, bit by bit, what the docstring defines, alone and in any batch."""
    vectors = hash_embeddings(texts, dims)
    assert vectors.shape == (len(texts), dims) and vectors.dtype == np.float32
    for text, vector in zip(texts, vectors):
        assert vector.tobytes() == by_the_book(text, dims).tobytes()


def test_vectors_stay_the_same_from_version_to_version() -> None:
    """The vectors of version 1 never change; nor does their space."""
    vectors = hash_embeddings([b"", "zażółć 🦊".encode(), *[b"x"] * 1000])
    digest = hashlib.sha256(vectors[:2].astype("<f4").tobytes()).hexdigest()
    assert (digest[:16], hash_space(384)) == ("b34a6b3991179972", "c472f57cf65a4593")
    assert (vectors[2:] == vectors[2]).all()


@pytest.mark.parametrize("dims", [384, 768, 1536, 3072])
def test_vectors_have_norm_1_and_are_about_orthogonal(dims: int) -> None:
    """Norm 1 within 1e-6; the cosines of different texts have mean 0 and deviation dims ** -0.5."""
    vectors = hash_embeddings([f"text {row}".encode() for row in range(1000)], dims)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = cosine(vectors[:500], vectors[500:])
    assert abs(cosines.mean()) < 5 * (500 * dims) ** -0.5
    assert cosines.std() == pytest.approx(dims**-0.5, rel=0.2)


def test_each_dims_is_a_space_of_its_own() -> None:
    """Spaces are 16 hex digits and differ from dims to dims."""
    spaces = {hash_space(dims) for dims in (384, 512, 768, 3072)}
    assert len(spaces) == 4 and all(len(space) == 16 and int(space, 16) >= 0 for space in spaces)


@pytest.mark.parametrize("dims", [0, 383, 3073])
def test_dims_outside_are_refused(dims: int) -> None:
    """384 to 3072."""
    for make in (lambda: hash_embeddings([b"a"], dims), lambda: hash_space(dims)):
        with pytest.raises(InvalidDimensions, match=f"dimensions is {dims}.*384 to 3072"):
            make()
