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
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, scheduler, triton
from halimede_engine import batching, session
from halimede_engine.scheduler import ItemResult
from halimede_ops import spec
from halimede_ops.errors import InvalidInput
from halimede_repository import checksums


class TritonPythonModel:
    """One instance of an ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model with the accelerators in its config."""
        config = triton.ModelConfig(args)
        path = config.version_folder / (
            config.fields.get("default_model_filename") or session.FILE_NAME
        )
        triton.load(lambda: checksums.check(config.version_folder))
        self.read = _read
        if [entry["name"] for entry in config.fields["input"]] == [spec.PIXELS]:
            positions = int(config.parameter("max_tokens"))
            self.read = partial(_read_pixels, positions=positions)
        self.metrics = metrics.Metrics(config, *metrics.RUN_COUNTERS)
        self.scheduler = scheduler.open_scheduler(
            config, path, args["model_instance_kind"], self.metrics
        )

    def execute(self, requests: list[Any]) -> None:
        """Queue the rows of each request; it is answered when they have run."""
        triton.answer_later(
            requests, self.read, self.scheduler.submit, _write, self.metrics.count_error
        )
        self.scheduler.wait_for_room()

    def finalize(self) -> None:
        """Answer all queued requests."""
        self.scheduler.close()
        self.metrics.close()


def _read(request: Any) -> list[session.Row]:
    ids = triton.tensor(request, "input_ids")
    mask = triton.tensor(request, "attention_mask")
    if ids.shape != mask.shape:
        raise InvalidInput(
            f"input_ids is {list(ids.shape)} and attention_mask {list(mask.shape)}; "
            "both must be [batch, tokens]"
        )
    lengths = batching.used_lengths(mask)
    return [
        # Copy: the arrays are Triton's memory, valid until `execute` returns.
        session.Row(ids[row, :length].copy(), mask[row, :length].copy())
        for row, length in enumerate(lengths)
    ]


def _read_pixels(request: Any, positions: int) -> list[session.Pixels]:
    return session.pixel_rows(triton.tensor(request, spec.PIXELS).copy(), positions)


def _write(results: Sequence[ItemResult]) -> list[Any]:
    outputs = session.stack_outputs([result.output for result in results])
    return [triton.output(name, values) for name, values in outputs.items()]
