"""Quantise: an FP32 model.onnx to FP16, or to INT8 with static quantisation (QDQ)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime
from onnxruntime.transformers.float16 import convert_float_to_float16

from halimede_ops import vectors
from halimede_ops.session import DATA_SUFFIX, Pixels, Row
from halimede_ops.spec import PIXELS, ModelSpec
from tools import graph
from tools.check import Engine, Tower
from tools.steps import console

KEPT_FP32 = (
    "ReduceSum", "ReduceL2", "ReduceMean", "Pow", "Sqrt", "Clip", "Div", "Softmax",
    "LayerNormalization",
)  # fmt: skip
"""Operators that FP16 would round or overflow in: sums over tokens, norms, softmax."""
KEEP_COUNTS = (0, 1, 2, 4, 8)
"""How many of the MatMuls that suffer most are left in FP32, tried in turn."""
MARGIN = 0.0005
"""What the mean cosine to FP32 must have beyond the bar of the mean cosine to the reference."""
RANKING_TEXTS = 24
FROM_MATMUL = ("MatMul", "Gemm")


def to_fp16(fp32: Path, target: Path) -> None:
    """Write `target`: weights in float16, inputs and outputs as before."""
    model = convert_float_to_float16(
        onnx.load(fp32), keep_io_types=True, op_block_list=list(KEPT_FP32)
    )
    graph.save(model, target)


def to_int8(
    fp32: Path,
    tower: Tower,
    spec: ModelSpec,
    calibration: Sequence[Any],
    inputs: Sequence[Any],
    kept_first: Sequence[str],
    target: Path,
) -> dict[str, Any]:
    """Write `target`: static QDQ INT8, activation ranges calibrated on the inputs given.

    Static, because dynamic quantisation takes its ranges from the whole batch, so that an
    input's vector would depend on its neighbours. Where plain INT8 misses its bar on `inputs`, the
    MatMuls whose inputs suffer most are left in FP32, a few more in each attempt; nodes whose
    name contains one of `kept_first` are left from the start.

    Returns:
        What was left in FP32, and each attempt's mean cosine to FP32.
    """
    rows = tower.rows(fp32.parent, spec)
    expected = Engine(fp32, rows, spec).embed(inputs)
    feeds = [feed(row) for row in rows(calibration)]
    named = [node.name for node in onnx.load(fp32, load_external_data=False).graph.node]
    first = [name for name in named if any(part in name for part in kept_first)]
    attempts: list[dict[str, Any]] = []
    ranked: list[str] = []
    for count in KEEP_COUNTS:
        if count == 1:
            ranked = [name for name in suffering(fp32, feeds[:RANKING_TEXTS]) if name not in first]
        kept = [*first, *ranked[:count]]
        _quantise(fp32, feeds, kept, target)
        got = Engine(target, rows, spec).embed(inputs)
        cosine = float(vectors.cosine(got, expected).mean())
        attempts.append({"kept_fp32": kept, "mean_cosine": round(cosine, 6)})
        console.print(f"    {len(kept)} MatMuls left in FP32: mean cosine {cosine:.6f}")
        if cosine >= tower.bars["int8"].mean_cosine + MARGIN:
            break
    return {"kept_fp32": kept, "attempts": attempts}


def suffering(fp32: Path, feeds: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """Names of the MatMuls with weights, the one whose input loses most by INT8 first.

    Values are rounded over the range that they have in all feeds: outliers widen the range and
    drown the rest.
    """
    model = onnx.load(fp32)
    weights = {weight.name for weight in model.graph.initializer}
    inputs = {
        node.name: node.input[0]
        for node in model.graph.node
        if node.op_type in FROM_MATMUL and node.input[1] in weights
    }
    values = _activations(model, sorted(set(inputs.values())), feeds)
    loss = {name: _rounding_loss(arrays) for name, arrays in values.items()}
    return sorted(inputs, key=lambda node: loss[inputs[node]], reverse=True)


def _activations(
    model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]
) -> dict[str, list[np.ndarray]]:
    """The named tensors' values in each feed."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run
    results = [run(list(names), feed) for feed in feeds]
    return {name: [result[index] for result in results] for index, name in enumerate(names)}


def _rounding_loss(arrays: Sequence[np.ndarray]) -> float:
    """Energy of the rounding error over that of the values about their channels' means."""
    values = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
    step = float(max(0.0, values.max()) - min(0.0, values.min())) / 255 or 1.0
    error = np.square(np.round(values / step) * step - values).sum()
    return float(error / max(np.square(values - values.mean(axis=0)).sum(), 1e-12))


def _quantise(
    fp32: Path, feeds: Sequence[dict[str, np.ndarray]], kept: Sequence[str], target: Path
) -> None:
    logging.getLogger("nncf").setLevel(logging.ERROR)
    quantised = nncf.quantize(
        onnx.load(fp32),
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        ignored_scope=nncf.IgnoredScope(names=list(kept)),
    )
    graph.dequantise_what_is_looked_up(quantised)
    for path in (target, target.with_name(target.name + DATA_SUFFIX)):
        path.unlink(missing_ok=True)
    graph.save(quantised, target)


def feed(row: Row | Pixels) -> dict[str, np.ndarray]:
    """The graph's inputs for one row alone, without padding."""
    if isinstance(row, Pixels):
        return {PIXELS: row.values[None]}
    return {"input_ids": row.ids[None], "attention_mask": row.mask[None]}
