"""Triton backend `router`: TEXT, INPUT_TYPE and DIMENSIONS to EMBEDDING and TOKENS, by the tower of
each text's input type.

It calls the model for queries, the model for documents, or both at the same time. An ensemble could
not: it runs all its steps for every text.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_ops import routing, spec

INPUTS = ("TEXT", "INPUT_TYPE", "DIMENSIONS")
OUTPUTS = ("EMBEDDING", "TOKENS")


class RouteRequest(NamedTuple):
    """One request."""

    rows: dict[str, list[int]]
    """Tower → the rows of its texts."""
    inputs: list[Any]
    """The request's tensors, each with a row for each text."""


class TritonPythonModel:
    """One instance of a router."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the spec, and the towers with the versions that the build made them in."""
        config = triton.ModelConfig(args)
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.towers = {
            tower: (config.parameter(f"{tower}_model"), int(config.parameter(f"{tower}_version")))
            for tower in set(self.spec.routes.values())
        }
        self.metrics = metrics.Metrics(config)

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Call the towers for all requests at the same time."""
        return await triton.answer_each(
            requests, self._read, self._embed, _write, self.metrics.count_error
        )

    def finalize(self) -> None:
        """Stop publishing metrics."""
        self.metrics.close()

    def _read(self, request: Any) -> RouteRequest:
        texts = triton.texts(request, self.spec)
        triton.dimensions(request, self.spec)  # raise here: the towers would answer
        rows = routing.rows_by_tower(self.spec, texts.input_types)
        return RouteRequest(rows, triton.tensors(request, *INPUTS))

    async def _embed(self, request: RouteRequest) -> list[np.ndarray]:
        parts = await asyncio.gather(
            *(self._call(tower, rows, request) for tower, rows in request.rows.items())
        )
        if len(parts) == 1:
            return parts[0]
        return [
            routing.merge(list(request.rows.values()), list(outputs))
            for outputs in zip(*parts, strict=True)
        ]

    async def _call(self, tower: str, rows: list[int], request: RouteRequest) -> list[np.ndarray]:
        model, version = self.towers[tower]
        inputs = request.inputs
        if len(request.rows) > 1:
            inputs = [triton.output(one.name(), one.as_numpy()[rows]) for one in inputs]
        return await triton.infer(model, version, inputs, *OUTPUTS)


def _write(outputs: list[np.ndarray]) -> list[Any]:
    return [triton.output(name, values) for name, values in zip(OUTPUTS, outputs, strict=True)]
