"""FP16: an FP32 model.onnx with its weights in float16."""

from __future__ import annotations

from pathlib import Path

from halimede_engine import session
from halimede_tools.build.graph import rewrite

KEPT_FP32 = (
    "ReduceSum", "ReduceL2", "ReduceMean", "Pow", "Sqrt", "Clip", "Div", "Softmax",
    "LayerNormalization",
)  # fmt: skip
"""Operators that FP16 would round or overflow in: sums over tokens, norms, softmax."""


def quantise(exported: Path, folder: Path) -> None:
    """Build step: write the FP16 model.onnx of an exported one; inputs and outputs stay FP32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(
        rewrite.load(exported / session.FILE_NAME),
        keep_io_types=True,
        op_block_list=list(KEPT_FP32),
    )
    rewrite.save(model, folder / session.FILE_NAME)
