"""INT8: static quantisation (QDQ) of an FP32 model.onnx.

Dynamic quantisation takes its ranges from the whole batch, so a text's vector would depend on its
neighbours.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from halimede_engine import cores, session
from halimede_engine.session import Pixels, Row
from halimede_ops import vectors
from halimede_ops.spec import PIXELS, ModelSpec
from halimede_tools.build.graph import outliers, rewrite
from halimede_tools.build.towers import TOWERS, Engine, Tower
from halimede_tools.console import console

KEEP_COUNTS = (0, 1, 2, 4, 8)
"""How many of the MatMuls with the largest rounding loss stay in FP32, tried in turn."""
MARGIN = 0.0005
"""By how much the mean cosine to FP32 must exceed the bar of the mean cosine to the reference."""
RANKING_INPUTS = 24
FROM_MATMUL = ("MatMul", "Gemm")
ALWAYS_FP32 = (outliers.APART, rewrite.POOL)
"""Parts of nodes' names: the outliers' branch, and pooling."""


def quantise(
    exported: Path, inputs: str, spec: ModelSpec, calibration: Sequence[Any], folder: Path
) -> None:
    """Build step: write the INT8 model.onnx of an exported one, and a record of the attempts."""
    tower = TOWERS[inputs]
    fp32, int8 = exported / session.FILE_NAME, folder / session.FILE_NAME
    attempts = to_int8(fp32, tower, spec, calibration, tower.check_inputs()[::3], int8)
    (folder / "quantised.json").write_text(json.dumps(attempts, indent=2))


def to_int8(
    fp32: Path,
    tower: Tower,
    spec: ModelSpec,
    calibration: Sequence[Any],
    inputs: Sequence[Any],
    target: Path,
) -> dict[str, Any]:
    """Write `target`: static QDQ INT8, activation ranges calibrated on the inputs given.

    Channels of outliers get a branch of their own in FP32. While INT8 misses its bar on `inputs`,
    the next attempt leaves more of the MatMuls with the largest rounding loss in FP32.

    Returns:
        The channels of outliers, the MatMuls left in FP32, and each attempt's mean cosine to FP32.
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
        quantised = Engine(target, rows, spec).embed(inputs)
        cosine = float(vectors.cosine(quantised, expected).mean())
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
    """The input of each MatMul with weights, over all feeds: name → `[tokens, channels]`."""
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
    """Values of the named tensors over all feeds: name → `[tokens, channels]`."""
    extended = copy.deepcopy(model)
    del extended.graph.output[:]
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cores.available()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run = onnxruntime.InferenceSession(
        extended.SerializeToString(), options, providers=["CPUExecutionProvider"]
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
    import nncf

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
    """The graph's inputs for one row, without padding."""
    if isinstance(row, Pixels):
        return {PIXELS: row.values[None]}
    return {"input_ids": row.ids[None], "attention_mask": row.mask[None]}
