"""What the client gives back: vectors with the facts needed to use them safely."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as the server describes it."""

    name: str
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims, 16 hex digits: vectors
    may be compared only within one space."""
    precision: str
    """fp32, fp16 or int8."""
    dims: int
    """Length of a full vector."""
    max_tokens: int
    """Longest input in tokens; what lies beyond is cut off."""
    max_batch_size: int
    """Most texts in one request."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of a sequence of texts, in its order."""

    vectors: np.ndarray
    """`[texts, dims]` float32."""
    tokens: np.ndarray
    """`[texts]` int32: tokens each whole text has, special tokens included."""
    model: str
    space: str
    precision: str
    max_tokens: int

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dims(self) -> int:
        """Length of each vector."""
        return int(self.vectors.shape[1])

    @property
    def truncated(self) -> np.ndarray:
        """`[texts]` bool: whether a text was longer than the model's limit and was cut off."""
        return self.tokens > self.max_tokens
