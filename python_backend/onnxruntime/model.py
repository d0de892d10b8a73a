"""Triton backend `onnxruntime` in Python, for installations that lack the C++ one.

It reads the same config.pbtxt: `optimization.execution_accelerators`, `instance_group` and the
parameter `intra_op_thread_count`. It batches continuously: it removes padding, queues the rows of
all requests together, and runs rows of similar length whenever a stream is free.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, scheduler, triton
from halimede_engine import batching, graph, session
from halimede_engine.requests import ItemResult
from halimede_ops import sparse, spec
from halimede_ops.errors import InvalidInput
from halimede_ops.sparse import SparseRow
from halimede_repository import checksums


class Limits(NamedTuple):
    """What the graph takes. Beyond it, OpenVINO computes a vector of something else."""

    vocabulary: int | None
    """Ids are below it. None: unknown."""
    max_tokens: int | None
    """Most tokens of a text. None: unknown."""
    has_unattended: bool = False
    """Whether -1 in the mask marks a token that no token attends to."""


class TritonPythonModel:
    """One instance of an ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model with the accelerators in its config."""
        config = triton.ModelConfig(args)
        path = config.version_folder / (
            config.fields.get("default_model_filename") or session.FILE_NAME
        )
        triton.load(lambda: checksums.check(config.version_folder))
        max_tokens = int(config.parameter("max_tokens", "0"))
        if [entry["name"] for entry in config.fields["input"]] == [spec.PIXELS]:
            self.read = partial(_read_pixels, positions=max_tokens)
        else:
            limits = Limits(
                graph.vocabulary(path),
                max_tokens or None,
                has_unattended=bool(config.parameter("unattended_tokens")),
            )
            self.read = partial(_read, limits=limits)
        self.dims = next(
            int(entry["dims"][0])
            for entry in config.fields["output"]
            if entry["name"] == spec.POOLED
        )
        self.metrics = metrics.Metrics(config, *metrics.RUN_COUNTERS)
        self.scheduler = scheduler.open_scheduler(
            config, path, args["model_instance_kind"], self.metrics
        )

    def execute(self, requests: list[Any]) -> None:
        """Queue the rows of each request; it is answered when they have run."""
        triton.answer_later(
            requests, self.read, self.scheduler.submit, self._write, self.metrics.count_error
        )
        self.scheduler.wait_for_room()

    def finalize(self) -> None:
        """Answer all queued requests."""
        self.scheduler.close()
        self.metrics.close()

    def _write(self, results: Sequence[ItemResult]) -> list[Any]:
        rows = [result.output for result in results]
        if isinstance(rows[0], SparseRow):
            return [triton.output(spec.POOLED, sparse.to_dense(rows, self.dims))]
        return [triton.output(name, values) for name, values in session.stack_outputs(rows).items()]


def _read(request: Any, limits: Limits) -> list[session.Row]:
    ids = triton.tensor(request, "input_ids", "tokens")
    mask = triton.tensor(request, "attention_mask", "tokens")
    if ids.shape != mask.shape:
        raise InvalidInput(
            f"input_ids is {list(ids.shape)} and attention_mask {list(mask.shape)}; "
            "both must be [batch, tokens]"
        )
    lengths = batching.used_lengths(mask)
    _check(ids, mask, int(lengths.max()), limits)
    types = triton.optional_tensor(request, spec.TOKEN_TYPES, ids.shape[1])
    return [
        # Copy: the arrays are Triton's memory, valid until `execute` returns.
        session.Row(
            ids[row, :length].copy(),
            mask[row, :length].copy(),
            types=None if types is None else types[row, :length].copy(),
        )
        for row, length in enumerate(lengths)
    ]


def _check(ids: np.ndarray, mask: np.ndarray, longest: int, limits: Limits) -> None:
    """Raise InvalidInput for values that the graph does not take."""
    # The numbers of a mask separate the texts of a packed row: a 2 would join another's text.
    if ((mask > 1) | (mask < -int(limits.has_unattended))).any():
        besides = "-1, 0 and 1" if limits.has_unattended else "0 and 1"
        raise InvalidInput(f"attention_mask has a value besides {besides}; 1 marks a token.")
    if ids.min() < 0 or (limits.vocabulary is not None and ids.max() >= limits.vocabulary):
        known = "" if limits.vocabulary is None else f" to {limits.vocabulary - 1:,}"
        raise InvalidInput(
            f"input_ids has ids from {ids.min():,} to {ids.max():,}; the model has 0{known}. Use "
            "the model's own tokenizer."
        )
    if limits.max_tokens is not None and longest > limits.max_tokens:
        raise InvalidInput(
            f"a text has {longest:,} tokens; the model takes {limits.max_tokens:,}. Truncate it."
        )


def _read_pixels(request: Any, positions: int) -> list[session.Pixels]:
    pixels = triton.tensor(request, spec.PIXELS, 3, "height", "width")
    return session.pixel_rows(pixels.copy(), positions)
