"""Triton backend `pooler`: pooled vectors and DIMENSIONS to the embeddings asked for.

Pooling itself (mean, cls, …) is part of model.onnx: the hidden states of every token never
leave the engine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
import triton_adapter as triton

from halimede_ops import spec, vectors
from halimede_ops.errors import HalimedeError, InvalidDimensions


class Pooled(NamedTuple):
    """One request."""

    vectors: np.ndarray
    dimensions: int | None


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
        given = triton.optional_tensor(request, "DIMENSIONS")
        if given is None:
            return Pooled(pooled, None)
        values = np.unique(given)
        if len(values) > 1:
            raise InvalidDimensions(
                "DIMENSIONS differs between the rows of one request; send one request for each"
            )
        return Pooled(pooled, vectors.check_dimensions(int(values[0]), self.spec))

    def _embed(self, requests: list[Pooled]) -> list[np.ndarray | HalimedeError]:
        return [
            vectors.embed(request.vectors, self.spec, request.dimensions) for request in requests
        ]


def _write(embeddings: np.ndarray) -> list[Any]:
    return [triton.output("EMBEDDING", embeddings)]
