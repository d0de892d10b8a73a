"""FP16: an FP32 model.onnx with its weights in float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx import TensorProto

from halimede_engine import session
from halimede_ops.spec import ModelSpec
from halimede_tools.build.checks import overflow
from halimede_tools.build.graph import rewrite
from halimede_tools.build.towers import TOWERS, feed
from halimede_tools.console import console

KEPT_FP32 = (
    "ReduceSum", "ReduceL2", "ReduceMean", "Pow", "Sqrt", "Clip", "Softmax", "LayerNormalization",
)  # fmt: skip
"""Operators that FP16 would round or overflow in: sums over tokens, norms, softmax. Division too,
but by a constant: a GELU with an operator in FP32 is not run as one by OpenVINO, which took 6 %."""


EVERY = 4
"""Of the check's inputs, every fourth shows which values are too large for float16."""


def quantise(exported: Path, inputs: str, spec: ModelSpec, folder: Path) -> None:
    """Build step: write the FP16 model.onnx of an exported one, and a record of the nodes that stay
    in FP32 as float16 cannot hold their values. Inputs and outputs stay FP32.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path, tower = exported / session.FILE_NAME, TOWERS[inputs]
    examined = [*tower.check_inputs()[: tower.odd_inputs], *tower.check_inputs()[::EVERY]]
    feeds = (feed(row) for row in tower.rows(exported, spec)(examined))
    large = overflow.overflowing(path, feeds)
    if large:
        console.print(f"    {len(large)} nodes stay in FP32: float16 cannot hold their values")
    model = rewrite.load(path)
    constants = {entry.name for entry in model.graph.initializer}
    kept = []
    for index, node in enumerate(model.graph.node):
        division = node.op_type == "Div" and node.input[1] not in constants
        # 1 + x in float16 has no digits left of an x below 0.0005.
        weight = rewrite.ACTIVATION in node.name
        if division or weight or node.output[0] in large:
            node.name = node.name or f"fp32/{index}"
            kept.append(node.name)
    model = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=list(KEPT_FP32), node_block_list=kept
    )
    _bypass_float16(model.graph, large)
    rewrite.sort_nodes(model.graph)
    rewrite.save(model, folder / session.FILE_NAME)
    (folder / "quantised.json").write_text(json.dumps({"too_large_for_fp16": sorted(large)}))


def _bypass_float16(graph: Any, large: set[str]) -> None:
    """Let nodes take these tensors in FP32. The conversion casts each output of a node that stays
    in FP32 to float16, and back to FP32 for the next one.
    """
    casts = [node for node in graph.node if node.op_type == "Cast"]
    before = {node.output[0]: node for node in casts if node.output[0] in large}
    for node in casts:
        if node.input[0] in before and node.attribute[0].i == TensorProto.FLOAT:
            node.input[0] = before[node.input[0]].input[0]
    used = {name for node in graph.node for name in node.input}
    for name in before.keys() - used:
        graph.node.remove(before[name])
