"""Triton backend `onnxruntime`, in Python: stands in for the C++ one where Triton has none.

It reads the same config.pbtxt: `optimization.execution_accelerators`, `instance_group` and the
parameter `intra_op_thread_count`. Requests of different lengths run together: padding is
trimmed, rows are sorted by length and cut into micro-batches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
import triton_adapter as triton

from halimede_ops import batch, session, spec
from halimede_ops.errors import HalimedeError, InvalidInput


class TritonPythonModel:
    """One instance of an ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model with the accelerators that its config asks for."""
        config = triton.ModelConfig(args)
        path = config.version_folder / (
            config.fields.get("default_model_filename") or session.FILE_NAME
        )
        accelerators = _accelerators(config, args["model_instance_kind"])
        self.session, missing = triton.load(
            lambda: session.open_session(
                path,
                accelerators,
                _threads(config),
                max_tokens=int(config.parameter("max_tokens", "0")) or None,
            )
        )
        for name in missing:
            triton.warn(
                f"{config.name}: this onnxruntime has no {name}; the CPU provider serves instead"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the rows of all requests together."""
        return triton.answer(requests, _read, self._run, _write)

    def _run(
        self, requests: list[list[session.Row]]
    ) -> Sequence[dict[str, np.ndarray] | HalimedeError]:
        rows = [row for request in requests for row in request]
        if self.session.heads:
            outputs = self._run_with_heads(rows)
            return [_stack([next(outputs) for _ in request]) for request in requests]
        vectors = self.session.run(rows)
        parts = triton.split(vectors, [len(request) for request in requests])
        return [{spec.POOLED: part} for part in parts]

    def _run_with_heads(self, rows: list[session.Row]) -> Iterator[dict[str, np.ndarray]]:
        outputs: dict[int, dict[str, np.ndarray]] = {}
        for part in batch.plan([len(row.ids) for row in rows]):
            ran = self.session.run_with_heads([rows[index] for index in part])
            outputs.update(zip(part, ran, strict=True))
        return (outputs[index] for index in range(len(rows)))


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
        session.Row(ids[row, :length], mask[row, :length]) for row, length in enumerate(lengths)
    ]


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One request's outputs: heads `[rows, tokens of the longest, width]`, zeros behind a row."""
    return {
        name: np.stack([row[name] for row in rows])
        if name == spec.POOLED
        else batch.pad_heads([row[name] for row in rows])
        for name in rows[0]
    }


def _write(outputs: dict[str, np.ndarray]) -> list[Any]:
    return [triton.output(name, values) for name, values in outputs.items()]


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
