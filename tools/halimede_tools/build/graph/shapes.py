"""Shapes: sizes that a traced graph computes although they never change.

Images of one size have the same height and width everywhere in the graph; the number of rows alone
differs between runs. The tracer still writes nodes that compute every size, and what is made of
them, such as Swin's masks of shifted windows. OpenVINO cannot run all of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from halimede_tools.build.graph import rewrite

ROUNDS = 8
"""Each round of folding can tell more sizes."""


def fold(path: Path) -> None:
    """Replace the sizes that are known by constants, and fold what follows from them."""
    for _ in range(ROUNDS):
        model = onnx.load(path, load_external_data=False)
        if not _replace_known(model):
            return
        onnx.save(model, path)
        folded = path.with_name("folded") / path.name
        folded.parent.mkdir(exist_ok=True)
        rewrite.optimise(path, folded)
        for file in folded.parent.iterdir():
            file.replace(path.parent / file.name)


def _replace_known(model: onnx.ModelProto) -> bool:
    """Replace the reading of a known size by a constant; whether there was one."""
    sizes = _sizes(onnx.shape_inference.infer_shapes(model, data_prop=True))
    graph: Any = model.graph
    constants = {entry.name: entry for entry in graph.initializer}
    shapes = {node.output[0]: sizes.get(node.input[0]) for node in graph.node if _is_shape(node)}
    known: dict[str, np.ndarray] = {}
    for name, size in shapes.items():
        if size and None not in size:
            known[name] = np.array(size, np.int64)
    for node in graph.node:
        size = shapes.get(node.input[0]) if node.op_type == "Gather" else None
        if size is None or node.input[1] not in constants:
            continue
        index = numpy_helper.to_array(constants[node.input[1]])
        if index.ndim == 0 and size[int(index)] is not None:
            known[node.output[0]] = np.array(size[int(index)], np.int64)
    kept = [node for node in graph.node if not known.keys() & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in known.items())
    return bool(known)


def _is_shape(node: Any) -> bool:
    return bool(node.op_type == "Shape" and not node.attribute)


def _sizes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """The size of each dimension of the tensors whose rank is known; None where it may change."""
    graph: Any = model.graph
    return {
        entry.name: [
            int(size.dim_value) if size.HasField("dim_value") else None
            for size in entry.type.tensor_type.shape.dim
        ]
        for entry in (*graph.value_info, *graph.input, *graph.output)
        if entry.type.tensor_type.HasField("shape")
    }
