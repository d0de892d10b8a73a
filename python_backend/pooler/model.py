"""Triton backend `pooler`: pooled vectors and DIMENSIONS to the embeddings asked for, and a
model's rows a token to the outputs of its further heads.

Pooling itself (mean, cls, …) is part of model.onnx: the hidden states of every token leave the
engine only for models that are built to give them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_ops import heads, spec, vectors
from halimede_ops.errors import HalimedeError


class Pooled(NamedTuple):
    """One request."""

    vectors: np.ndarray
    dimensions: int | None
    heads: dict[str, np.ndarray]
    """Head → its output."""


class TritonPythonModel:
    """One instance of a pooler model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the model's spec."""
        config = triton.ModelConfig(args)
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.metrics = metrics.Metrics(config)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Truncate and normalise each request's vectors."""
        return triton.answer(requests, self._read, self._embed, _write, self.metrics.failed)

    def finalize(self) -> None:
        """Publish no more figures."""
        self.metrics.close()

    def _read(self, request: Any) -> Pooled:
        pooled = triton.tensor(request, spec.POOLED)
        return Pooled(pooled, triton.dimensions(request, self.spec), self._heads(request))

    def _heads(self, request: Any) -> dict[str, np.ndarray]:
        if not self.spec.heads:
            return {}
        rows = {name: triton.tensor(request, name) for name in self.spec.heads}
        tokens = min(values.shape[1] for values in rows.values())
        ids, mask = (triton.tensor(request, name) for name in ("input_ids", "attention_mask"))
        return heads.outputs(rows, ids[:, :tokens], mask[:, :tokens], self.spec)

    def _embed(self, requests: list[Pooled]) -> list[dict[str, np.ndarray] | HalimedeError]:
        return [
            {
                "EMBEDDING": vectors.embed(request.vectors, self.spec, request.dimensions),
                **request.heads,
            }
            for request in requests
        ]


def _write(outputs: dict[str, np.ndarray]) -> list[Any]:
    return [triton.output(name, values) for name, values in outputs.items()]
