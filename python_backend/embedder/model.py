"""Triton backend `embedder`: TEXT, INPUT_TYPE and DIMENSIONS to EMBEDDING, TOKENS and the further
heads' outputs, all in one process.

It does what the ensemble's three steps do, from the same files, without a hand-over between them:
texts wait together, those that wait are tokenized together and run in the cheapest micro-batches,
and each request is answered as soon as its rows have run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import engine, metrics, triton
from halimede_engine import batching, session
from halimede_engine.response_cache import Embedded, Recent
from halimede_engine.scheduler import Outcome
from halimede_ops import heads, spec, text, vectors
from halimede_repository import checksums

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A text takes 50 µs; waking more threads for a few of them takes the cores from the model.

CACHE_MB = "HALIMEDE_RESPONSE_CACHE_MB"
"""Environment variable: memory for what was asked before, of each model without further heads."""
MB = 1_000_000


class Asked(NamedTuple):
    """One request."""

    texts: triton.Texts
    dimensions: int | None


class Run(NamedTuple):
    """One request whose rows have run."""

    asked: Asked
    embedded: list[Embedded]
    """One a text. The row of a model with further heads is a dict of all that it gave."""
    rows: list[session.Row]
    """Of the texts that were run: all, where there are further heads."""


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer and the model that the ensemble's steps have."""
        config = triton.ModelConfig(args)
        onnx = config.repository / config.parameter("onnx")
        tokenizer = config.repository / config.parameter("tokenizer")
        for folder in (onnx, tokenizer):
            triton.load(partial(checksums.check, folder))
        self.spec = triton.load(lambda: spec.load(tokenizer))
        self.tokenizer = triton.load(lambda: text.load(tokenizer, self.spec))
        self.metrics = metrics.Metrics(
            config,
            *metrics.OF_RUNS,
            metrics.TRUNCATED_TEXTS,
            metrics.CACHED_TEXTS,
        )
        # Rows of further heads are as large as their texts are long: they are not kept.
        cache_mb = 0 if self.spec.heads else int(os.environ.get(CACHE_MB, "0"))
        self.recent = Recent(cache_mb * MB)
        self.batches = engine.open_batches(
            config,
            onnx / session.FILE_NAME,
            args["model_instance_kind"],
            self.metrics,
            read=self._tokenize,
            most_requests=int(config.parameter("max_queue_size", "0")) or None,
        )

    def execute(self, requests: list[Any]) -> None:
        """Queue the texts of each request; it is answered when they have run."""
        triton.answer_later(requests, self._read, self._embed, self._write, self.metrics.failed)
        self.batches.gather()

    def finalize(self) -> None:
        """Answer what waits."""
        self.batches.close()
        self.metrics.close()

    def _read(self, request: Any) -> Asked:
        return Asked(triton.texts(request, self.spec), triton.dimensions(request, self.spec))

    def _embed(
        self, asked: Asked, send: Callable[[Any], None], is_cancelled: Callable[[], bool]
    ) -> None:
        prompted = self.tokenizer.prompted(*asked.texts)
        embedded = self.recent.find(prompted)
        places = [place for place, one in enumerate(embedded) if one is None]
        self.metrics.count_cached(len(embedded) - len(places))
        missing = [prompted[place] for place in places]

        def answer(outcome: Outcome) -> None:
            if isinstance(outcome, Exception):
                send(outcome)
                return
            made = [Embedded(done.result, done.row.total) for done in outcome]
            for place, one in zip(places, made, strict=True):
                embedded[place] = one
            send(Run(asked, embedded, [done.row for done in outcome]))
            self.recent.keep(missing, made)

        if missing:
            self.batches.submit(missing, answer, is_cancelled)
        else:
            answer([])

    def _tokenize(self, prompted: Sequence[str]) -> list[session.Row]:
        tokens = self.tokenizer.encode_prompted(prompted)
        self.metrics.count_truncated(tokens, self.spec)
        return session.rows(tokens)

    def _write(self, run: Run) -> list[Any]:
        outputs = session.joined([one.row for one in run.embedded])
        pooled = outputs.pop(spec.POOLED)
        totals = np.array([[one.total] for one in run.embedded], np.int32)
        return [
            triton.output("EMBEDDING", vectors.embed(pooled, self.spec, run.asked.dimensions)),
            triton.output("TOKENS", totals),
            *(triton.output(*head) for head in self._heads(outputs, run.rows).items()),
        ]

    def _heads(
        self, outputs: dict[str, np.ndarray], rows: list[session.Row]
    ) -> dict[str, np.ndarray]:
        if not outputs:
            return {}
        lengths = [row.length for row in rows]
        longest = max(lengths)
        ids = batching.pad([row.ids for row in rows], longest)
        return heads.outputs(outputs, ids, batching.mask(lengths, longest), self.spec)
