"""What the client gives back: vectors with the facts needed to use them safely."""

from __future__ import annotations

import dataclasses

import numpy as np

UNKNOWN_TOKENS = -1
"""Token count of a text whose provider does not tell it."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as its provider describes it."""

    name: str
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims, 16 hex digits: vectors
    may be compared only within one space."""
    precision: str
    """fp32, fp16 or int8; `remote` where the provider does not tell."""
    dims: int
    """Length of a full vector."""
    max_tokens: int
    """Longest input in tokens; what lies beyond is cut off."""
    max_batch_size: int
    """Most texts in one request."""
    provider: str = "triton"
    """Kind of provider."""
    mean_cosine: float | None = None
    """Mean cosine to the reference, as the build measured it; None where nobody recorded it."""
    version: str = ""
    """Version that names this content and no other; empty where versions do not."""

    def is_alike(self, other: ServedModel) -> bool:
        """Whether vectors of both may stand in one result: same space and precision."""
        return (self.space, self.precision) == (other.space, other.precision)


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of a sequence of texts, in its order: all of one space and precision."""

    vectors: np.ndarray
    """`[texts, dims]` of `output_type`; for `binary` and `ubinary` `[texts, dims / 8]` bytes."""
    tokens: np.ndarray
    """`[texts]` int32: tokens each whole text has, special tokens included; -1: not told."""
    model: str
    space: str
    precision: str
    max_tokens: int
    provider: str = "triton"
    """Kind of provider whose model this is."""
    output_type: str = "float32"
    cached: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.bool_))
    """`[texts]` bool: whether the vector came from a cache."""

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dims(self) -> int:
        """Components of each vector."""
        packed = self.output_type in ("binary", "ubinary")
        return int(self.vectors.shape[1]) * (8 if packed else 1)

    @property
    def truncated(self) -> np.ndarray:
        """`[texts]` bool: whether a text was longer than the model's limit and was cut off."""
        return self.tokens > self.max_tokens
