"""Triton backend `tokenizer`: a text, or a pair of texts, to token ids, attention mask, token types
and TOKENS, and for a late-interaction model to the tokens that have a vector in the answer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_engine import batching
from halimede_ops import spans, spec, text, vectors
from halimede_ops.errors import HalimedeError
from halimede_repository import checksums

PADDING_IS_FREE = (Path(__file__).parent.parent / "onnxruntime" / "model.py").exists()
"""Whether our own `onnxruntime` backend is installed beside this one. It removes padding, but
Triton batches only requests of equal shape: all rows are padded to one length. Triton's C++ backend
computes padding: rows are padded to the model's length buckets."""
FREE_TOKENS = 512
"""Length to which all shorter rows are padded where padding is free."""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One text takes 50 µs: more threads for a few texts would only take cores from the model.


class TritonPythonModel:
    """One instance of a tokenizer model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model's tokenizer."""
        config = triton.ModelConfig(args)
        triton.load(lambda: checksums.check(config.version_folder))
        self.spec = triton.load(lambda: spec.load(config.version_folder))
        self.tokenizer = triton.load(lambda: text.load(config.version_folder, self.spec))
        self.metrics = metrics.Metrics(config, metrics.TRUNCATED_TEXTS)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Tokenize the texts of all requests in one call."""
        return triton.answer(
            requests, self._read, self._tokenize, self._write, self.metrics.count_error
        )

    def finalize(self) -> None:
        """Stop publishing metrics."""
        self.metrics.close()

    def _read(self, request: Any) -> triton.Texts:
        return triton.texts(request, self.spec)

    def _tokenize(self, requests: list[triton.Texts]) -> list[list[text.Tokens] | HalimedeError]:
        prompted = [item for request in requests for item in self.tokenizer.prompted(*request)]
        tokens = self.tokenizer.encode_prompted(prompted)
        self.metrics.count_truncated(tokens)
        remaining = iter(tokens)
        rows = [[next(remaining) for _ in request.texts] for request in requests]
        return [triton.attempt(self._checked, own) for own in rows]

    def _write(self, rows: list[text.Tokens]) -> list[Any]:
        lengths = [len(row.ids) for row in rows]
        length = self._padded_length(max(lengths))
        outputs = {
            "input_ids": batching.pad([row.ids for row in rows], length),
            "attention_mask": batching.pad(
                [batching.attention(len(row.ids), row.unattended) for row in rows], length
            ),
            "TOKENS": np.array([[row.total] for row in rows], np.int32),
        }
        if self.spec.token_types:
            types = [row.types or [0] * len(row.ids) for row in rows]
            outputs[spec.TOKEN_TYPES] = batching.pad(types, length)
        if self.spec.late is not None:
            outputs[spec.KEPT] = batching.pad([row.kept or [] for row in rows], length)
        own = [row.spans for row in rows if row.spans is not None]
        if own:
            outputs[spec.SPANS] = np.stack(own)
        return [triton.output(name, values) for name, values in outputs.items()]

    def _checked(self, rows: list[text.Tokens]) -> list[text.Tokens]:
        totals = [row.total for row in rows]
        vectors.check_tokens(totals, self.spec)
        if triton.takes_spans(self.spec):
            spans.check_whole(totals, [row.spans for row in rows], self.spec)
        return rows

    def _padded_length(self, longest: int) -> int:
        if PADDING_IS_FREE and longest <= FREE_TOKENS:
            return min(FREE_TOKENS, self.spec.max_tokens)
        return batching.bucket(longest, self.spec.length_buckets)
