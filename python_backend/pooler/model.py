"""Triton backend `pooler`: pooled vectors and DIMENSIONS to EMBEDDING, scores to SCORE or SCORES,
or weights of a vocabulary to SPARSE_IDS and SPARSE_WEIGHTS, and the per-token outputs of a model's
heads to the outputs that clients get.

Pooling itself (mean, cls, …) is part of model.onnx. The hidden states of all tokens are an output
of the engine only for models that are built with that output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_ops import heads, spans, sparse, spec, vectors
from halimede_ops.errors import HalimedeError, InvalidInput


class PoolRequest(NamedTuple):
    """One request."""

    vectors: np.ndarray
    """Pooled vectors `[batch, dims]` float32; `[0, dims]` of a late-interaction model, which has
    vectors of tokens alone."""
    dimensions: int | None
    heads: dict[str, np.ndarray]
    """Output name → array: see `halimede_ops.heads.outputs`."""
    spans: np.ndarray | None = None
    """What `halimede_ops.spans.sums` gives for each text; None: the model takes no spans."""


class TritonPythonModel:
    """One instance of a pooler model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the model's spec."""
        config = triton.ModelConfig(args)
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.metrics = metrics.Metrics(config)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Truncate and normalise the vectors of each request."""
        return triton.answer(requests, self._read, self._embed, _write, self.metrics.count_error)

    def finalize(self) -> None:
        """Stop publishing metrics."""
        self.metrics.close()

    def _read(self, request: Any) -> PoolRequest:
        if self.spec.late is not None:
            return PoolRequest(np.empty((0, self.spec.dims), np.float32), None, self._late(request))
        pooled = triton.tensor(request, spec.POOLED, self.spec.dims)
        own = self._spans(request) if triton.takes_spans(self.spec) else None
        return PoolRequest(pooled, triton.dimensions(request, self.spec), self._heads(request), own)

    def _spans(self, request: Any) -> np.ndarray:
        values = triton.tensor(request, spec.POOLED_TOKENS, "tokens", self.spec.dims)
        tokens = triton.tensor(request, spec.SPANS, "spans", 2)
        if len(tokens) != len(values) or tokens.min() < 0 or tokens.max() > values.shape[1]:
            raise InvalidInput(
                f"{spec.SPANS} has {len(tokens)} rows with tokens from {tokens.min()} to "
                f"{tokens.max()}; {spec.POOLED_TOKENS} has {len(values)} rows of "
                f"{values.shape[1]} tokens."
            )
        return np.stack([spans.sums(*row) for row in zip(values, tokens, strict=True)])

    def _heads(self, request: Any) -> dict[str, np.ndarray]:
        rows = {
            name: triton.tensor(request, name, "tokens", width)
            for name, width in self.spec.heads.items()
            if name != spec.POOLED_TOKENS
        }
        if not rows:
            return {}
        # The engine gives no rows for padding, which ids and mask have.
        tokens = min(values.shape[1] for values in rows.values())
        rows = {name: values[:, :tokens] for name, values in rows.items()}
        ids, mask = (
            triton.tensor(request, name, "tokens") for name in ("input_ids", "attention_mask")
        )
        if min(ids.shape[1], mask.shape[1]) < tokens:
            raise InvalidInput(
                f"input_ids has {ids.shape[1]} tokens and attention_mask {mask.shape[1]}; the "
                f"outputs of tokens have {tokens}."
            )
        return heads.outputs(rows, ids[:, :tokens], mask[:, :tokens], self.spec)

    def _late(self, request: Any) -> dict[str, np.ndarray]:
        vectors_of_tokens = triton.tensor(request, spec.MULTI_VECTOR, "tokens", self.spec.dims)
        kept = triton.tensor(request, spec.KEPT, "tokens")
        # The engine gives no rows for padding, which `kept` has.
        tokens = vectors_of_tokens.shape[1]
        if kept.shape[1] < tokens:
            raise InvalidInput(
                f"{spec.KEPT} has {kept.shape[1]} tokens; {spec.MULTI_VECTOR} has {tokens}."
            )
        return heads.late(vectors_of_tokens, kept[:, :tokens])

    def _embed(self, requests: list[PoolRequest]) -> list[dict[str, np.ndarray] | HalimedeError]:
        return [triton.attempt(self._embed_one, request) for request in requests]

    def _embed_one(self, request: PoolRequest) -> dict[str, np.ndarray]:
        if self.spec.late is not None:
            return request.heads
        if self.spec.kind == spec.SPARSE_KIND:
            return sparse.outputs(sparse.from_dense(request.vectors))
        embeddings = vectors.embed(request.vectors, self.spec, request.dimensions)
        further = dict(request.heads)
        if request.spans is not None:
            further |= spans.outputs(request.spans, self.spec, request.dimensions)
        return {spec.VECTOR_OUTPUTS[self.spec.kind]: embeddings, **further}


def _write(outputs: dict[str, np.ndarray]) -> list[Any]:
    return [triton.output(name, values) for name, values in outputs.items()]
