"""Tables: the embeddings of a static model in INT8. Here, so that the step needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import numpy_helper

from halimede_tools.build.graph import rewrite


def to_int8(fp32: Path, target: Path) -> None:
    """Write `target`: the table in int8, with a scale for each token's vector."""
    model = rewrite.load(fp32)
    constants = {entry.name: entry for entry in model.graph.initializer}
    tables = {
        node.input[0]: node
        for node in model.graph.node
        if node.op_type == "Gather" and len(constants[node.input[0]].dims) == 2
    }
    for name, lookup in tables.items():
        values = numpy_helper.to_array(constants[name])
        scales = np.maximum(np.abs(values).max(axis=1), np.float32(1e-12)) / np.float32(127)
        rows = np.round(values / scales[:, None]).astype(np.int8)
        constants[name].CopyFrom(numpy_helper.from_array(rows, name))
        rewrite.look_up_quantised(model.graph, lookup, name, scales)
    rewrite.save(model, target)
