"""Quantise: an FP32 model.onnx to FP16, or to INT8 with static quantisation (QDQ)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halimede_ops import text
from halimede_ops.spec import ModelSpec

KEPT_FP32 = ("ReduceSum", "ReduceL2", "Clip", "Div", "Softmax", "LayerNormalization")
"""Operators that FP16 would round or overflow in: sums over tokens, norms, softmax."""


def to_fp16(fp32: Path, target: Path) -> None:
    """Write `target`: weights in float16, inputs and outputs as before."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(
        onnx.load(fp32), keep_io_types=True, op_block_list=list(KEPT_FP32)
    )
    onnx.save(model, target)


def to_int8(
    fp32: Path,
    tokenizer_folder: Path,
    spec: ModelSpec,
    calibration: Sequence[str],
    kept_fp32: Sequence[str],
    target: Path,
) -> None:
    """Write `target`: static QDQ INT8, activation ranges calibrated on the texts given.

    Nodes whose name contains one of `kept_fp32` are left as they are.

    Static, because dynamic quantisation takes its ranges from the whole batch, so that a
    text's vector would depend on its neighbours.
    """
    import nncf
    import onnx

    logging.getLogger("nncf").setLevel(logging.ERROR)
    tokenizer = text.load(tokenizer_folder, spec)

    def feed(sample: str) -> dict[str, np.ndarray]:
        ids = np.array([tokenizer.encode([sample], [None])[0].ids], np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    model = onnx.load(fp32)
    kept = [node.name for node in model.graph.node if any(part in node.name for part in kept_fp32)]
    quantised = nncf.quantize(
        model,
        nncf.Dataset(list(calibration), feed),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(names=kept),
    )
    onnx.save(quantised, target)
