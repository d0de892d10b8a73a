"""Triton backend `fusion`: TEXT and IMAGE, either alone or both, to one EMBEDDING.

It asks the two models that embed them, both at a time, and neither for what a request leaves out:
an ensemble runs all of its steps for every request, and a vision tower for no image costs as much
as for one.
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


class Asked(NamedTuple):
    """One request."""

    text: list[Any]
    """The input tensors for the text model; none where the request has no text."""
    image: list[Any]
    dimensions: int | None


class TritonPythonModel:
    """One instance of a fusion."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the projection, and which versions of the two models it was made for."""
        config = triton.ModelConfig(args)
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.fusion = triton.load(lambda: fusion.load(config.version_folder))
        self.text_version = int(config.parameter("text_version"))
        self.image_version = int(config.parameter("image_version"))
        self.metrics = metrics.Metrics(config)

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Ask both models for all requests at a time, then fuse each."""
        return await triton.answer_each(
            requests, self._read, self._fuse, _write, self.metrics.failed
        )

    def finalize(self) -> None:
        """Publish no more figures."""
        self.metrics.close()

    def _read(self, request: Any) -> Asked:
        text = triton.given(request, "TEXT")
        return Asked(
            text + triton.given(request, "INPUT_TYPE") if text else [],
            triton.given(request, "IMAGE"),
            triton.dimensions(request, self.spec),
        )

    async def _fuse(self, asked: Asked) -> np.ndarray:
        text, image = await asyncio.gather(
            _embedded(self.fusion.text_model, self.text_version, asked.text),
            _embedded(self.fusion.image_model, self.image_version, asked.image),
        )
        return vectors.embed(vectors.fuse(text, image, self.fusion), self.spec, asked.dimensions)


async def _embedded(model: str, version: int, inputs: list[Any]) -> np.ndarray | None:
    return await triton.ask(model, version, inputs, "EMBEDDING") if inputs else None


def _write(embeddings: np.ndarray) -> list[Any]:
    return [triton.output("EMBEDDING", embeddings)]
