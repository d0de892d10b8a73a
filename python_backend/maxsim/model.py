"""Triton backend `maxsim`: QUERY and TEXT to SCORE, by the multi-vectors of another model.

It calls that model, in the version that it was built with, once for all texts of a request: equal
queries are embedded once, and so are equal documents. An ensemble could not: it has no input type
of its own for each of two texts.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_ops import maxsim, spec


class TritonPythonModel:
    """One instance of a model that scores pairs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the facts of the model that embeds the texts."""
        config = triton.ModelConfig(args)
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.model = config.parameter("model")
        self.version = int(config.parameter("model_version"))
        self.max_rows = int(config.fields["max_batch_size"])
        self.metrics = metrics.Metrics(config)

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Embed the texts of all requests at the same time, then score the pairs of each."""
        return await triton.answer_each(
            requests, self._read, self._score, _write, self.metrics.count_error
        )

    def finalize(self) -> None:
        """Stop publishing metrics."""
        self.metrics.close()

    def _read(self, request: Any) -> triton.Texts:
        return triton.texts(request, self.spec)

    async def _score(self, pairs: triton.Texts) -> dict[str, np.ndarray]:
        distinct = maxsim.distinct(pairs.texts, pairs.seconds or [])
        starts = range(0, len(distinct.texts), self.max_rows)
        parts = await asyncio.gather(
            *[self._embed(distinct, slice(start, start + self.max_rows)) for start in starts]
        )
        matrices = [
            matrix for part in parts for matrix in maxsim.without_padding(part["MULTI_VECTORS"])
        ]
        tokens = np.concatenate([part["TOKENS"] for part in parts])
        return {
            "SCORE": maxsim.score_pairs(matrices, distinct)[:, None],
            "TOKENS": tokens[distinct.documents],
        }

    async def _embed(self, distinct: maxsim.Distinct, rows: slice) -> dict[str, np.ndarray]:
        inputs = [
            triton.output(name, np.array([[value.encode()] for value in values[rows]], np.object_))
            for name, values in (("TEXT", distinct.texts), ("INPUT_TYPE", distinct.input_types))
        ]
        names = ("MULTI_VECTORS", "TOKENS")
        outputs = await triton.infer(self.model, self.version, inputs, *names)
        return dict(zip(names, outputs, strict=True))


def _write(outputs: dict[str, np.ndarray]) -> list[Any]:
    return [triton.output(name, values) for name, values in outputs.items()]
