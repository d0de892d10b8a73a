"""Triton backend `fusion`: TEXT, IMAGE or both to one EMBEDDING.

It calls the model that embeds texts and the model that embeds images, both at the same time, and
skips the one whose input a request leaves out. An ensemble could not: it runs all its steps for
every request, and a vision tower costs the same without an image.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_ops import fusion, spec, vectors


class FuseRequest(NamedTuple):
    """One request."""

    text: list[Any]
    """Input tensors of the text model; empty if the request has no text."""
    image: list[Any]
    """Input tensors of the image model; empty if the request has no image."""
    dimensions: int | None


class TritonPythonModel:
    """One instance of a fusion."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the projection and the versions of the two models that it was made for."""
        config = triton.ModelConfig(args)
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.fusion = triton.load(lambda: fusion.load(config.version_folder))
        self.text_version = int(config.parameter("text_version"))
        self.image_version = int(config.parameter("image_version"))
        self.metrics = metrics.Metrics(config)

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Call both models for all requests at the same time, then fuse the vectors of each."""
        return await triton.answer_each(
            requests, self._read, self._fuse, _write, self.metrics.count_error
        )

    def finalize(self) -> None:
        """Stop publishing metrics."""
        self.metrics.close()

    def _read(self, request: Any) -> FuseRequest:
        for name in ("TEXT", "INPUT_TYPE", "IMAGE"):
            triton.optional_tensor(request, name, 1)  # raise here: the models would answer
        text = triton.tensors(request, "TEXT")
        return FuseRequest(
            text + triton.tensors(request, "INPUT_TYPE") if text else [],
            triton.tensors(request, "IMAGE"),
            triton.dimensions(request, self.spec),
        )

    async def _fuse(self, request: FuseRequest) -> np.ndarray:
        text, image = await asyncio.gather(
            _embed(self.fusion.text_model, self.text_version, request.text),
            _embed(self.fusion.image_model, self.image_version, request.image),
        )
        return vectors.embed(vectors.fuse(text, image, self.fusion), self.spec, request.dimensions)


async def _embed(model: str, version: int, inputs: list[Any]) -> np.ndarray | None:
    return (await triton.infer(model, version, inputs, "EMBEDDING"))[0] if inputs else None


def _write(embeddings: np.ndarray) -> list[Any]:
    return [triton.output("EMBEDDING", embeddings)]
