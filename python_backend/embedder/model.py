"""Triton backend `embedder`: the inputs and outputs of an ensemble of texts, in one process.

It serves every kind of model that takes texts: TEXT, INPUT_TYPE and DIMENSIONS to EMBEDDING, TOKENS
and the outputs of further heads; QUERY and TEXT to SCORE; TEXT and TEXT_PAIR to SCORES; TEXT and
INPUT_TYPE to SPARSE_IDS and SPARSE_WEIGHTS, or to MULTI_VECTORS.

It gives what the ensemble's three steps give, from the same files, without passing tensors between
processes: queued texts are tokenized together and run in the cheapest micro-batches, and each
request is answered as soon as its rows have run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, scheduler, triton
from halimede_engine import session
from halimede_engine.engine import Embeddings, SharedEngine, text_bytes, text_rows
from halimede_engine.response_cache import ResponseCache
from halimede_ops import spec, text
from halimede_repository import checksums

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One text takes 50 µs: more threads for a few texts would only take cores from the model.

CACHE_MB = "HALIMEDE_RESPONSE_CACHE_MB"
"""Environment variable: size of each model's response cache in MB. Models with heads have none."""
MB = 1_000_000


class EmbedRequest(NamedTuple):
    """One request."""

    texts: triton.Texts
    dimensions: int | None


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer and the model of the ensemble's steps."""
        config = triton.ModelConfig(args)
        onnx = config.repository / config.parameter("onnx")
        tokenizer = config.repository / config.parameter("tokenizer")
        for folder in (onnx, tokenizer):
            triton.load(partial(checksums.check, folder))
        self.spec = triton.load(lambda: spec.load(tokenizer))
        self.tokenizer = triton.load(lambda: text.load(tokenizer, self.spec))
        self.metrics = metrics.Metrics(
            config,
            *metrics.RUN_COUNTERS,
            metrics.TRUNCATED_TEXTS,
            metrics.CACHED_TEXTS,
        )
        opened = scheduler.open_scheduler(
            config,
            onnx / session.FILE_NAME,
            args["model_instance_kind"],
            self.metrics,
            text_rows(self.tokenizer, triton.reported(self._count_truncated)),
            text_bytes,
            max_requests=int(config.parameter("max_queue_size", "0")) or None,
        )
        cache_bytes = int(os.environ.get(CACHE_MB, "0")) * MB
        cache = ResponseCache(cache_bytes) if cache_bytes and not self.spec.heads else None
        self.engine = SharedEngine(opened, self.spec, cache)

    def execute(self, requests: list[Any]) -> None:
        """Queue the texts of each request; it is answered when they have run."""
        triton.answer_later(
            requests, self._read, self._embed, self._write, self.metrics.count_error
        )
        self.engine.gather()

    def finalize(self) -> None:
        """Answer all queued requests."""
        self.engine.close()
        self.metrics.close()

    def _read(self, request: Any) -> EmbedRequest:
        return EmbedRequest(triton.texts(request, self.spec), triton.dimensions(request, self.spec))

    def _embed(
        self,
        request: EmbedRequest,
        answer: Callable[[Embeddings | Exception], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        prompted = self.tokenizer.prompted(*request.texts)
        cached = self.engine.submit(prompted, request.dimensions, answer, is_cancelled)
        triton.reported(self.metrics.count_cached)(cached)

    def _count_truncated(self, tokens: Sequence[text.Tokens]) -> None:
        self.metrics.count_truncated(tokens)

    def _write(self, embeddings: Embeddings) -> list[Any]:
        outputs = {"TOKENS": embeddings.tokens.reshape(-1, 1)} | embeddings.heads
        if self.spec.kind in spec.VECTOR_OUTPUTS:
            outputs[spec.VECTOR_OUTPUTS[self.spec.kind]] = embeddings.vectors
        return [triton.output(name, values) for name, values in outputs.items()]
