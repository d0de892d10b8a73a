"""Quantise: an FP32 model.onnx to FP16, or to INT8 with static quantisation (QDQ)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime
from onnxruntime.transformers.float16 import convert_float_to_float16

from halimede_engine.session import Pixels, Row
from halimede_ops import vectors
from halimede_ops.spec import PIXELS, ModelSpec
from halimede_tools.build.check import Engine, Tower
from halimede_tools.build.graph import outliers, packing, rewrite
from halimede_tools.build.steps import console

KEPT_FP32 = (
    "ReduceSum", "ReduceL2", "ReduceMean", "Pow", "Sqrt", "Clip", "Div", "Softmax",
    "LayerNormalization",
)  # fmt: skip
"""Operators that FP16 would round or overflow in: sums over tokens, norms, softmax."""
KEEP_COUNTS = (0, 1, 2, 4, 8)
"""How many of the MatMuls that suffer most are left in FP32, tried in turn."""
MARGIN = 0.0005
"""What the mean cosine to FP32 must have beyond the bar of the mean cosine to the reference."""
RANKING_INPUTS = 24
FROM_MATMUL = ("MatMul", "Gemm")
ALWAYS_FP32 = (outliers.APART, packing.POOL)
"""Parts of nodes' names: outliers' own way, and pooling."""


def to_fp16(fp32: Path, target: Path) -> None:
    """Write `target`: weights in float16, inputs and outputs as before."""
    model = convert_float_to_float16(
        rewrite.load(fp32), keep_io_types=True, op_block_list=list(KEPT_FP32)
    )
    rewrite.save(model, target)


def to_int8(
    fp32: Path,
    tower: Tower,
    spec: ModelSpec,
    calibration: Sequence[Any],
    inputs: Sequence[Any],
    target: Path,
) -> dict[str, Any]:
    """Write `target`: static QDQ INT8, activation ranges calibrated on the inputs given.

    Static, because dynamic quantisation takes its ranges from the whole batch, so that an
    input's vector would depend on its neighbours. Channels of outliers go their own way in FP32;
    where INT8 still misses its bar on `inputs`, the MatMuls whose inputs suffer most are left in
    FP32, a few more in each attempt.

    Returns:
        The channels that were taken apart, what was left in FP32, and each attempt's mean cosine
        to FP32.
    """
    rows = tower.rows(fp32.parent, spec)
    expected = Engine(fp32, rows, spec).embed(inputs)
    feeds = [feed(row) for row in rows(calibration)]
    model = rewrite.load(fp32)
    values = matmul_inputs(model, feeds[:RANKING_INPUTS])
    found = {name: outliers.channels(array) for name, array in values.items()}
    apart = outliers.take_apart(model, {name: some for name, some in found.items() if some})
    loss = {name: outliers.rounding_loss(array) for name, array in values.items()}
    ranked = sorted(set(values) - set(apart), key=loss.__getitem__, reverse=True)
    attempts: list[dict[str, Any]] = []
    for count in KEEP_COUNTS:
        kept = ranked[:count]
        _quantise(copy.deepcopy(model), feeds, kept, target)
        got = Engine(target, rows, spec).embed(inputs)
        cosine = float(vectors.cosine(got, expected).mean())
        attempts.append({"kept_fp32": kept, "mean_cosine": round(cosine, 6)})
        console.print(
            f"    outliers of {len(apart)} MatMuls apart, {count} in FP32: mean cosine {cosine:.6f}"
        )
        if cosine >= tower.bars["int8"].mean_cosine + MARGIN:
            break
    return {
        "apart": {name: found[name] for name in apart},
        "kept_fp32": kept,
        "attempts": attempts,
    }


def matmul_inputs(
    model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What goes into each MatMul with weights, over all feeds: name → `[tokens, channels]`."""
    weights = {weight.name for weight in model.graph.initializer}
    inputs = {
        node.name: node.input[0]
        for node in model.graph.node
        if node.op_type in FROM_MATMUL and node.input[1] in weights
    }
    values = _activations(model, sorted(set(inputs.values())), feeds)
    return {node: values[name] for node, name in inputs.items()}


def _activations(
    model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The named tensors' values in all feeds, by token or picture's position."""
    asked = copy.deepcopy(model)
    del asked.graph.output[:]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run = onnxruntime.InferenceSession(
        asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run
    results = [run(list(names), feed) for feed in feeds]
    return {
        name: np.concatenate(
            [result[place].reshape(-1, result[place].shape[-1]) for result in results]
        )
        for place, name in enumerate(names)
    }


def _quantise(
    model: onnx.ModelProto,
    feeds: Sequence[dict[str, np.ndarray]],
    kept: Sequence[str],
    target: Path,
) -> None:
    logging.getLogger("nncf").setLevel(logging.ERROR)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        ignored_scope=nncf.IgnoredScope(
            names=list(kept), patterns=[f".*{part}.*" for part in ALWAYS_FP32], validate=False
        ),
    )
    rewrite.dequantise_what_is_looked_up(quantised)
    rewrite.drop_zero_points(quantised)
    rewrite.save(quantised, target)


def feed(row: Row | Pixels) -> dict[str, np.ndarray]:
    """The graph's inputs for one row alone, without padding."""
    if isinstance(row, Pixels):
        return {PIXELS: row.values[None]}
    return {"input_ids": row.ids[None], "attention_mask": row.mask[None]}
