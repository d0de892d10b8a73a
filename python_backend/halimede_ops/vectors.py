"""Pooled vectors to embeddings: truncate, normalise; texts' and images' to one: fuse."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from halimede_ops.errors import InvalidDimensions, InvalidInput
from halimede_ops.fusion import Fusion
from halimede_ops.spec import ModelSpec


class _Model(Protocol):
    """A model's name and the length of its vectors: those of a ModelSpec, or of a client."""

    @property
    def name(self) -> str: ...

    @property
    def dims(self) -> int: ...


def embed(pooled: np.ndarray, spec: ModelSpec, dimensions: int | None = None) -> np.ndarray:
    """Embeddings `[batch, dimensions]` float32 from pooled vectors `[batch, spec.dims]` float32.

    Raises:
        InvalidDimensions: `dimensions` lies outside 1 … `spec.dims`.
    """
    wanted = check_dimensions(dimensions, spec)
    if spec.layer_norm_before_cut and wanted < spec.dims:
        pooled = layer_norm(pooled)
    cut = truncate(pooled, wanted)
    return normalise(cut) if spec.normalised else cut


def check_dimensions(dimensions: int | None, spec: _Model) -> int:
    """`dimensions`, or the model's dims for None.

    Raises:
        InvalidDimensions: it lies outside 1 … `spec.dims`.
    """
    if dimensions is None:
        return spec.dims
    if not 1 <= dimensions <= spec.dims:
        raise InvalidDimensions(
            f"dimensions is {dimensions}; {spec.name} gives 1 to {spec.dims}. "
            f"Omit it for all {spec.dims}."
        )
    return dimensions


def truncate(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first `dimensions` components of each vector: `[batch, dim]` → `[batch, dimensions]`."""
    return vectors[:, :dimensions]


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Vectors of L2 norm 1, `[batch, dim]` float32; a zero vector stays zero, never NaN."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.float32(1e-12))


def layer_norm(vectors: np.ndarray) -> np.ndarray:
    """Vectors of mean 0 and variance 1, `[batch, dim]` float32; as PyTorch's, without weights."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(1e-5))


def fuse(text: np.ndarray | None, image: np.ndarray | None, fusion: Fusion) -> np.ndarray:
    """Fused vectors `[batch, fusion.dims]` float32 of text vectors `[batch, text dims]` and image
    vectors `[batch, image dims]` float32; either may be None.

    Each vector is normalised, centred and weighted, both are put side by side, what is missing
    counting nothing, and projected. Late fusion: the models know nothing of each other.

    Raises:
        InvalidInput: both are None.
    """
    parts = [
        (normalise(vectors) - mean) @ projection
        for vectors, mean, projection in (
            (text, fusion.text_mean, fusion.text_projection),
            (image, fusion.image_mean, fusion.image_projection),
        )
        if vectors is not None
    ]
    if not parts:
        raise InvalidInput("neither TEXT nor IMAGE was given; give one of them, or both.")
    return np.asarray(sum(parts[1:], start=parts[0]), np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with the same row of `b`: two `[n, dim]` → `[n]` float64."""
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    return np.einsum("nd,nd->n", a64, b64) / np.maximum(norms, 1e-24)
