"""Pooled vectors to embeddings: truncate, normalise, fuse."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from halimede_ops.errors import InvalidDimensions, InvalidInput, InvalidText, NonFiniteVector
from halimede_ops.fusion import Fusion
from halimede_ops.spec import ModelSpec


class _Model(Protocol):
    """A model's name and the length of its vectors: those of a ModelSpec, or of a client."""

    @property
    def name(self) -> str: ...

    @property
    def dims(self) -> int: ...


def embed(pooled: np.ndarray, spec: ModelSpec, dimensions: int | None = None) -> np.ndarray:
    """Truncate and normalise pooled vectors, as the model's spec says.

    Pooled vectors `[batch, spec.dims]` float32 → embeddings `[batch, dimensions]` float32. None
    keeps all dimensions.

    Raises:
        InvalidDimensions: `dimensions` is outside 1 … `spec.dims`.
        NonFiniteVector: a pooled vector is not finite.
    """
    dims = check_dimensions(dimensions, spec)
    check_finite(pooled)
    if spec.layer_norm_before_cut and dims < spec.dims:
        pooled = layer_norm(pooled)
    truncated = truncate(pooled, dims)
    return normalise(truncated) if spec.normalised else truncated


def check_dimensions(dimensions: int | None, spec: _Model) -> int:
    """Return `dimensions`, or the model's dims if it is None.

    Raises:
        InvalidDimensions: `dimensions` is outside 1 … `spec.dims`.
    """
    if dimensions is None:
        return spec.dims
    if not 1 <= dimensions <= spec.dims:
        raise InvalidDimensions(
            f"dimensions is {dimensions}; {spec.name} gives 1 to {spec.dims}. "
            f"Omit it for all {spec.dims}."
        )
    return dimensions


def check_finite(vectors: np.ndarray) -> None:
    """Raise unless each vector of a batch, `[batch, …]` float, is finite.

    Raises:
        NonFiniteVector: one is not; `index` is that of the first one.
    """
    finite = are_finite(vectors)
    if not finite.all():
        raise NonFiniteVector(
            "has no vector: the model gives NaN or infinity for it. Leave it out, or use the model "
            "in a higher precision.",
            subject="input",
            index=int(finite.argmin()),
        )


def check_tokens(totals: Iterable[int], spec: ModelSpec) -> None:
    """Raise unless each text of a request has a token. A tokenizer that adds no special tokens
    makes none of an empty text. A static model gives zeros for it, any other has no vector.

    Raises:
        InvalidText: a text has none; `index` is that of the first one.
    """
    for index, total in enumerate(totals):
        if total == 0 and not spec.static:
            raise InvalidText(
                "has no token for this model, which adds none to a text. Leave it out.",
                subject="text",
                index=index,
            )


def are_finite(vectors: np.ndarray) -> np.ndarray:
    """Whether each vector and its L2 norm are finite: `[batch, …]` float → `[batch]` bool."""
    rows = vectors.astype(np.float32, copy=False)
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    # A norm beyond float32 would scale its vector to 0.
    return np.isfinite(np.einsum("nd,nd->n", rows, rows))


def truncate(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Keep the first components of each vector: `[batch, dims]` → `[batch, dimensions]`."""
    return vectors[:, :dimensions]


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to L2 norm 1: `[batch, dims]` float32. A zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.float32(1e-12))


def layer_norm(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to mean 0 and variance 1: `[batch, dims]` float32.

    This is PyTorch's `layer_norm` without weights.
    """
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(1e-5))


def fuse(text: np.ndarray | None, image: np.ndarray | None, fusion: Fusion) -> np.ndarray:
    """Fuse text vectors and image vectors: `[batch, fusion.dims]` float32.

    Each vector is normalised and centred, then projected; the sum of the projections is the fused
    vector. This is late fusion: the two models run independently.

    Args:
        text: text vectors `[batch, text dims]` float32, or None.
        image: image vectors `[batch, image dims]` float32, or None.
        fusion: the projection.

    Raises:
        InvalidInput: `text` and `image` are both None.
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
    """Cosine similarity of the rows of `a` and `b`, pair by pair: `[n, dims]` → `[n]` float64."""
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    return np.einsum("nd,nd->n", a64, b64) / np.maximum(norms, 1e-24)
