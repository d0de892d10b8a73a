"""FP16: an FP32 model.onnx with its weights in float16."""

from __future__ import annotations

from pathlib import Path

from halimede_engine import session
from halimede_tools.build.graph import rewrite

KEPT_FP32 = (
    "ReduceSum", "ReduceL2", "ReduceMean", "Pow", "Sqrt", "Clip", "Softmax", "LayerNormalization",
)  # fmt: skip
"""Operators that FP16 would round or overflow in: sums over tokens, norms, softmax. Division too,
but by a constant: a GELU with an operator in FP32 is not run as one by OpenVINO, which took 6 %."""


def quantise(exported: Path, folder: Path) -> None:
    """Build step: write the FP16 model.onnx of an exported one; inputs and outputs stay FP32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = rewrite.load(exported / session.FILE_NAME)
    constants = {entry.name for entry in model.graph.initializer}
    divisions = [
        node.name
        for node in model.graph.node
        if node.op_type == "Div" and node.input[1] not in constants
    ]
    model = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=list(KEPT_FP32), node_block_list=divisions
    )
    rewrite.save(model, folder / session.FILE_NAME)
