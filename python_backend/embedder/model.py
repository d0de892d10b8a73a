"""Triton backend `embedder`: TEXT, INPUT_TYPE and DIMENSIONS to EMBEDDING, TOKENS and the further
heads' outputs, all in one process.

It does what the ensemble's three steps do, from the same files, without a hand-over between them:
texts are tokenized as they come, their rows wait together, and each request is answered as soon as
its rows have run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
import engine
import triton_adapter as triton
import triton_metrics

from halimede_ops import batch, heads, session, spec, text, vectors

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A text takes 50 µs; waking more threads for a few of them takes the cores from the model.


class Asked(NamedTuple):
    """One request."""

    texts: triton.Texts
    dimensions: int | None


class Run(NamedTuple):
    """One request whose rows have run."""

    asked: Asked
    tokens: list[text.Tokens]
    rows: Any
    """What each row gave."""


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer and the model that the ensemble's steps have."""
        config = triton.ModelConfig(args)
        onnx = config.repository / config.parameter("onnx")
        tokenizer = config.repository / config.parameter("tokenizer")
        self.spec = triton.load(lambda: spec.load(tokenizer))
        self.tokenizer = triton.load(lambda: text.load(tokenizer, self.spec))
        self.metrics = triton_metrics.Metrics(
            config, *triton_metrics.OF_RUNS, triton_metrics.TRUNCATED_TEXTS
        )
        self.batches = engine.open_batches(
            config, onnx / session.FILE_NAME, args["model_instance_kind"], self.metrics
        )

    def execute(self, requests: list[Any]) -> None:
        """Tokenize and queue each request; it is answered when its rows have run."""
        triton.answer_later(requests, self._read, self._start, self._write, self.metrics.failed)
        self.batches.wait_for_room()

    def finalize(self) -> None:
        """Answer what waits."""
        self.batches.close()
        self.metrics.close()

    def _read(self, request: Any) -> Asked:
        return Asked(triton.texts(request, self.spec), triton.dimensions(request, self.spec))

    def _start(
        self, asked: Asked, send: Callable[[Any], None], is_cancelled: Callable[[], bool]
    ) -> None:
        tokens = self.tokenizer.encode(*asked.texts)
        self.metrics.count_truncated(tokens, self.spec)

        def answer(outcome: Any) -> None:
            failed = isinstance(outcome, Exception)
            send(outcome if failed else Run(asked, tokens, outcome))

        self.batches.submit(session.rows(one.ids for one in tokens), answer, is_cancelled)

    def _write(self, run: Run) -> list[Any]:
        outputs = session.joined(run.rows)
        pooled = outputs.pop(spec.POOLED)
        totals = np.array([[one.total] for one in run.tokens], np.int32)
        return [
            triton.output("EMBEDDING", vectors.embed(pooled, self.spec, run.asked.dimensions)),
            triton.output("TOKENS", totals),
            *(triton.output(*head) for head in self._heads(outputs, run.tokens).items()),
        ]

    def _heads(
        self, rows: dict[str, np.ndarray], tokens: list[text.Tokens]
    ) -> dict[str, np.ndarray]:
        if not rows:
            return {}
        lengths = [len(one.ids) for one in tokens]
        longest = max(lengths)
        ids = batch.pad([one.ids for one in tokens], longest)
        return heads.outputs(rows, ids, batch.mask(lengths, longest), self.spec)
