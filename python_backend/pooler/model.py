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
import triton_adapter as triton

from halimede_ops import heads, spec, vectors
from halimede_ops.errors import HalimedeError, InvalidDimensions


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
        folder = triton.ModelConfig(args).version_folder
        self.spec = triton.load(lambda: spec.load(folder))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Truncate and normalise each request's vectors."""
        return triton.answer(requests, self._read, self._embed, _write)

    def _read(self, request: Any) -> Pooled:
        pooled = triton.tensor(request, spec.POOLED)
        return Pooled(pooled, self._dimensions(request), self._heads(request))

    def _dimensions(self, request: Any) -> int | None:
        given = triton.optional_tensor(request, "DIMENSIONS")
        if given is None:
            return None
        values = np.unique(given)
        if len(values) > 1:
            raise InvalidDimensions(
                "DIMENSIONS differs between the rows of one request; send one request for each"
            )
        return vectors.check_dimensions(int(values[0]), self.spec)

    def _heads(self, request: Any) -> dict[str, np.ndarray]:
        if not self.spec.heads:
            return {}
        rows = {name: triton.tensor(request, name) for name in self.spec.heads}
        tokens = min(values.shape[1] for values in rows.values())
        ids, mask = (triton.tensor(request, name) for name in ("input_ids", "attention_mask"))
        return _outputs(rows, ids[:, :tokens], mask[:, :tokens], self.spec)

    def _embed(self, requests: list[Pooled]) -> list[dict[str, np.ndarray] | HalimedeError]:
        return [
            {
                "EMBEDDING": vectors.embed(request.vectors, self.spec, request.dimensions),
                **request.heads,
            }
            for request in requests
        ]


def _outputs(
    rows: dict[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, model: spec.ModelSpec
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if spec.SPARSE in rows:
        weights = rows[spec.SPARSE][:, :, 0]
        found["SPARSE_IDS"], found["SPARSE_WEIGHTS"] = heads.sparse(
            ids, weights, mask, model.special_ids
        )
    if spec.MULTI_VECTOR in rows:
        found["MULTI_VECTORS"] = heads.per_token(rows[spec.MULTI_VECTOR], mask, first=1)
    if spec.TOKEN_EMBEDDINGS in rows:
        found["TOKEN_EMBEDDINGS"] = heads.per_token(rows[spec.TOKEN_EMBEDDINGS], mask)
    return found


def _write(outputs: dict[str, np.ndarray]) -> list[Any]:
    return [triton.output(name, values) for name, values in outputs.items()]
