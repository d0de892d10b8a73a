"""Triton backend `onnxruntime`, in Python: stands in for the C++ one where Triton has none.

It reads the same config.pbtxt: `optimization.execution_accelerators`, `instance_group` and the
parameter `intra_op_thread_count`. Batching is continuous: the rows of all requests wait together,
padding is trimmed, and whenever a stream is free it runs rows of like length.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
import triton_adapter as triton

from halimede_ops import batch, continuous, session, spec
from halimede_ops.errors import InvalidInput

STREAMS = 2
"""Micro-batches that one instance runs at the same time, each on its share of the threads."""


class TritonPythonModel:
    """One instance of an ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model with the accelerators that its config asks for."""
        config = triton.ModelConfig(args)
        path = config.version_folder / (
            config.fields.get("default_model_filename") or session.FILE_NAME
        )
        accelerators = _accelerators(config, args["model_instance_kind"])
        threads = _threads(config)
        streams = min(STREAMS, threads)
        max_tokens = int(config.parameter("max_tokens", "0")) or None
        opened, missing = triton.load(
            lambda: session.open_session(path, accelerators, threads, streams, max_tokens)
        )
        for name in missing:
            triton.warn(
                f"{config.name}: this onnxruntime has no {name}; the CPU provider serves instead"
            )
        run = opened.run_with_heads if opened.heads else opened.run_together
        self.batches = continuous.ContinuousBatches(run, streams)

    def execute(self, requests: list[Any]) -> None:
        """Queue the rows of all requests; each request is answered when its rows have run."""
        triton.answer_later(requests, _read, self.batches.submit, _write)
        self.batches.wait_for_room()

    def finalize(self) -> None:
        """Answer what waits."""
        self.batches.close()


def _read(request: Any) -> list[session.Row]:
    ids = triton.tensor(request, "input_ids")
    mask = triton.tensor(request, "attention_mask")
    if ids.shape != mask.shape:
        raise InvalidInput(
            f"input_ids is {list(ids.shape)} and attention_mask {list(mask.shape)}; "
            "both must be [batch, tokens]"
        )
    lengths = batch.used_lengths(mask)
    return [
        # Copied: the arrays are Triton's memory, and end with `execute`.
        session.Row(ids[row, :length].copy(), mask[row, :length].copy())
        for row, length in enumerate(lengths)
    ]


def _write(rows: list[Any]) -> list[Any]:
    """The outputs of one request from its rows' vectors, or from their outputs by name."""
    if not isinstance(rows[0], dict):
        return [triton.output(spec.POOLED, np.stack(rows))]
    return [triton.output(name, _together(name, [row[name] for row in rows])) for name in rows[0]]


def _together(name: str, rows: list[np.ndarray]) -> np.ndarray:
    """One output of a request; heads are as long as its longest row, zeros behind the others."""
    return np.stack(rows) if name == spec.POOLED else batch.pad_heads(rows)


def _accelerators(config: triton.ModelConfig, kind: str) -> list[session.Accelerator]:
    asked = config.fields.get("optimization", {}).get("execution_accelerators", {})
    gpu = asked.get("gpu_execution_accelerator", []) if kind == "GPU" else []
    return [
        session.Accelerator(entry["name"], entry.get("parameters", {}))
        for entry in [*gpu, *asked.get("cpu_execution_accelerator", [])]
    ] + ([session.Accelerator("cuda")] if kind == "GPU" and not gpu else [])


def _threads(config: triton.ModelConfig) -> int:
    """CPU threads of this instance: what the config says, else its share of the cores."""
    asked = int(config.parameter("intra_op_thread_count", "0"))
    instances = sum(group.get("count", 1) for group in config.fields.get("instance_group", []))
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, instances))
