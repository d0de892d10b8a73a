"""Overflow: the nodes of an FP32 graph whose values float16 cannot hold.

A CPU computes FP16 in float32 or bfloat16, which hold larger values, so vectors that are measured
there do not show an overflow. A GPU computes it in float16: a value above 65,504 becomes infinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from halimede_engine import cores

HEADROOM = 4
"""How many times as large as the observed values others may be."""
LARGEST = float(np.finfo(np.float16).max) / HEADROOM
"""Largest value that may be observed in a tensor of float16."""
LARGEST_CONSTANT = 10_000.0
"""The conversion to float16 limits constants, those of masks among them, to this."""
FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
"""onnxruntime's option for a graph that is not opened by its path."""


def overflowing(path: Path, feeds: Iterable[Mapping[str, np.ndarray]]) -> set[str]:
    """The first output of each node of a model.onnx that gives or takes too large a value for
    float16 on any of the inputs.
    """
    model = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    _limit_constants(model)
    tensors = _floats(model)
    session = _session(model, tensors, path.parent)
    names = {entry.name for entry in session.get_inputs()}
    highest = np.zeros(len(tensors))
    for feed in feeds:
        types = {name: np.zeros_like(feed["input_ids"]) for name in names - set(feed)}
        highest = np.fmax(highest, _finite(session.run(None, {**feed, **types})))
    large = {name for name, value in zip(tensors, highest, strict=True) if value > LARGEST}
    return {node.output[0] for node in nodes if large & {*node.input, *node.output}}


def _limit_constants(model: onnx.ModelProto) -> None:
    """Limit constants as the conversion does. Weights beside the graph stay as they are."""
    for entry in model.graph.initializer:
        if entry.data_type == TensorProto.FLOAT and entry.data_location != TensorProto.EXTERNAL:
            values = onnx.numpy_helper.to_array(entry)
            limited = np.clip(values, -LARGEST_CONSTANT, LARGEST_CONSTANT).astype(np.float32)
            entry.CopyFrom(onnx.numpy_helper.from_array(limited, entry.name))


def _floats(model: onnx.ModelProto) -> list[str]:
    """The outputs of nodes that are float32."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in (*inferred.value_info, *inferred.output)
    }
    outputs = (name for node in model.graph.node for name in node.output)
    return [name for name in outputs if types.get(name) == TensorProto.FLOAT]


def _session(
    model: onnx.ModelProto, tensors: list[str], folder: Path
) -> onnxruntime.InferenceSession:
    """A session that gives the largest absolute value of each of the tensors."""
    del model.graph.output[:]
    for index, name in enumerate(tensors):
        magnitude, largest = f"overflow/{index}/abs", f"overflow/{index}"
        model.graph.node.extend(
            [
                helper.make_node("Abs", [name], [magnitude]),
                helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cores.available()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(folder))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _finite(values: list[np.ndarray]) -> np.ndarray:
    """Values as an array; what is NaN counts as infinite."""
    return np.nan_to_num(np.array(values, np.float64), nan=np.inf, posinf=np.inf)
