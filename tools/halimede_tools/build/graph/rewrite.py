"""Rewrite: load, save, optimise and change ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import compose, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data, uses_external_data

from halimede_engine import cores
from halimede_engine.session import data_of
from halimede_ops.errors import InvalidModel
from halimede_ops.spec import POOLED, TOKEN_EMBEDDINGS

INPUTS = ("input_ids", "attention_mask")
HIDDEN, MASK, TAIL = "hidden", "mask", "tail/"
POOL = "/pool/"
"""Part of the names of the nodes that pool: graph.packing calls that module `pool`."""
ACTIVATION = f"{POOL}activation/"
"""Part of the names of the nodes that make weights of pooled logits, in graph.splade."""
FATAL = 4
"""onnxruntime's severity of messages that end a process."""
SMALLEST_BYTES = 1024
"""Smallest constant that is stored beside the graph; onnxruntime has the same limit."""


def load(path: Path) -> onnx.ModelProto:
    """A model that `save` or `optimise` wrote, with its weights.

    onnx's own loader refuses a weights file with several hard links, and the store and the
    repository share theirs.
    """
    model = onnx.load(path, load_external_data=False)
    weights = [entry for entry in _constants(model.graph) if uses_external_data(entry)]
    if weights:
        data = np.memmap(data_of(path), np.uint8, "r")
        for entry in weights:
            info = ExternalDataInfo(entry)
            entry.raw_data = data[info.offset or 0 :][: info.length].tobytes()
            entry.data_location = onnx.TensorProto.DEFAULT
            del entry.external_data[:]
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with its weights beside it. The weights are removed from `model`."""
    weights = data_of(path)
    weights.unlink(missing_ok=True)  # onnx would append to it
    for entry in _constants(model.graph):
        if len(entry.raw_data) >= SMALLEST_BYTES:
            set_external_data(entry, weights.name)
    onnx.save(model, path)
    if weights.exists():
        weights.chmod(path.stat().st_mode)  # onnx makes it readable by its owner only


def keep_outputs(path: Path, widths: Mapping[str, int]) -> None:
    """Drop all outputs but these, and set the size of their last dimension."""
    model = onnx.load(path)
    found = {output.name: output for output in model.graph.output}
    del model.graph.output[:]
    for name, width in widths.items():
        last = found[name].type.tensor_type.shape.dim[-1]
        last.Clear()
        last.dim_value = width
        model.graph.output.append(found[name])
    save(model, path)


def optimise(raw: Path, target: Path) -> onnxruntime.InferenceSession:
    """Fold constants and drop dead nodes. The result has standard operators only, so OpenVINO and
    TensorRT read the same file. Return the session that has done it.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = FATAL  # the build says what failed
    options.intra_op_num_threads = cores.available()
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", data_of(target).name
    )
    opened = onnxruntime.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])
    # onnxruntime 1.24 writes the constants of an If's branches twice where weights lie beside.
    model = onnx.load(target, load_external_data=False)
    for graph in _graphs(model.graph):
        kept = {entry.name: entry for entry in graph.initializer}
        if len(kept) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept.values())
    onnx.save(model, target)
    return opened


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the graphs of its nodes' branches, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The constants of a graph and its branches."""
    return (entry for part in _graphs(graph) for entry in part.initializer)


def convolutions(model: onnx.ModelProto) -> list[str]:
    """The names of the convolutions."""
    return [node.name for node in model.graph.node if node.op_type == "Conv"]


def dequantise_what_is_looked_up(model: onnx.ModelProto) -> None:
    """Dequantise rows after they are looked up, not the whole table before: an engine that folds
    constants would hold the table in float32, at four times its size. A row's values stay the same
    to the bit.
    """
    graph: Any = model.graph
    constants = {entry.name: entry for entry in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for lookup in [node for node in graph.node if node.op_type == "Gather"]:
        table = made_by.get(lookup.input[0])
        if table is None or table.op_type != "DequantizeLinear":
            continue
        if _axis(lookup, 0) != 0 or not set(table.input) <= set(constants):
            continue
        values, scale, zero = (numpy_helper.to_array(constants[name]) for name in table.input)
        by_row = scale.ndim == 0 or (scale.ndim == 1 and _axis(table, 1) == 0)
        if by_row and not zero.any():
            look_up_quantised(graph, lookup, table.input[0], np.broadcast_to(scale, len(values)))
    _drop_unused(model, "DequantizeLinear")


def drop_zero_points(model: onnx.ModelProto) -> None:
    """Drop zero points of weights if all are 0, which is the default. Engines would subtract them
    from every weight, or spend time finding out that they need not.
    """
    constants = {entry.name: entry for entry in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        of_constant = all(name in constants for name in node.input)
        if of_constant and not numpy_helper.to_array(constants[node.input[2]]).any():
            del node.input[2]
    drop_unused_constants(model)


def _axis(node: onnx.NodeProto, default: int) -> int:
    return next((entry.i for entry in node.attribute if entry.name == "axis"), default)


def look_up_quantised(graph: Any, lookup: Any, table: str, scale: np.ndarray) -> None:
    """Replace a Gather by a lookup of int8 rows times a lookup of the rows' scales."""
    ids, name = lookup.input[1], lookup.output[0]
    scales = np.ascontiguousarray(scale.reshape(-1, 1), np.float32)
    graph.initializer.append(numpy_helper.from_array(scales, f"{name}/scales"))
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), f"{name}/one"))
    place = list(graph.node).index(lookup)
    graph.node.remove(lookup)
    for node in (
        helper.make_node("Mul", [f"{name}/float", f"{name}/scale"], [name]),
        helper.make_node("Gather", [f"{name}/scales", ids], [f"{name}/scale"]),
        helper.make_node("DequantizeLinear", [f"{name}/int8", f"{name}/one"], [f"{name}/float"]),
        helper.make_node("Gather", [table, ids], [f"{name}/int8"]),
    ):
        graph.node.insert(place, node)


def _drop_unused(model: onnx.ModelProto, operator: str) -> None:
    """Drop the nodes of this operator whose outputs are not used, and then unused constants."""
    graph: Any = model.graph
    used = set(_used(graph))
    for node in [node for node in graph.node if node.op_type == operator]:
        if not used & set(node.output):
            graph.node.remove(node)
    drop_unused_constants(model)


def drop_unused_constants(model: onnx.ModelProto) -> None:
    """Drop the constants that no node uses.

    onnxruntime's OnnxModel.update_graph also drops what only a branch within a branch uses.
    """
    graph: Any = model.graph
    used = set(_used(graph))
    for entry in [entry for entry in graph.initializer if entry.name not in used]:
        graph.initializer.remove(entry)


def _used(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the inputs of all nodes, those of branches included."""
    return (name for part in _graphs(graph) for node in part.node for name in node.input)


def sort_nodes(graph: Any) -> None:
    """Sort nodes so that each follows those whose outputs it uses, as ONNX demands. Nodes that do
    not depend on each other keep their order.
    """
    made = {name for node in graph.node for name in node.output}
    ordered: list[onnx.NodeProto] = []
    waiting = [(node, made & {*node.input, *_used_in_branches(node)}) for node in graph.node]
    given: set[str] = set()
    while waiting:
        later = []
        for node, needed in waiting:
            if needed <= given:
                ordered.append(node)
                given.update(node.output)
            else:
                later.append((node, needed))
        if len(later) == len(waiting):
            raise ValueError("the graph has a cycle")
        waiting = later
    nodes = [_copied(node) for node in ordered]
    del graph.node[:]
    graph.node.extend(nodes)


def _used_in_branches(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from _used(attribute.g)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def opset(model: onnx.ModelProto) -> int:
    """The opset version of a model's standard operators."""
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


def output_names(model: onnx.ModelProto) -> list[str]:
    """Names of a model's outputs."""
    return [output.name for output in model.graph.output]


def load_body(path: Path) -> onnx.ModelProto:
    """A ready-made transformer with our two inputs only and its hidden state as TOKEN_EMBEDDINGS.

    Raises:
        InvalidModel: it has unknown inputs, or no hidden state.
    """
    model = onnx.load(path)
    for name in [entry.name for entry in model.graph.input]:
        if name == "token_type_ids":
            _make_zeros(model, name)
        elif name not in INPUTS:
            raise InvalidModel(
                f"the folder's model.onnx takes {name}; it may take input_ids, attention_mask "
                "and token_type_ids."
            )
    names = output_names(model)
    if "last_hidden_state" in names and TOKEN_EMBEDDINGS not in names:
        _connect(model, "last_hidden_state", TOKEN_EMBEDDINGS)
        hidden = onnx.ValueInfoProto()
        hidden.CopyFrom(model.graph.output[names.index("last_hidden_state")])
        hidden.name = TOKEN_EMBEDDINGS
        model.graph.output.append(hidden)
    elif TOKEN_EMBEDDINGS not in names and POOLED not in names:
        raise InvalidModel(
            f"the folder's model.onnx gives {', '.join(names)}; it must give "
            f"last_hidden_state, {TOKEN_EMBEDDINGS} or {POOLED}."
        )
    return model


def append(body: onnx.ModelProto, tail: Path) -> None:
    """Append a graph that takes HIDDEN and MASK to the body's hidden state and attention mask."""
    after = compose.add_prefix(onnx.load(tail), TAIL).graph
    _connect(body, TOKEN_EMBEDDINGS, TAIL + HIDDEN)
    _connect(body, "attention_mask", TAIL + MASK)
    body.graph.node.extend(after.node)
    body.graph.initializer.extend(after.initializer)
    for output in after.output:
        name = output.name.removeprefix(TAIL)
        _connect(body, output.name, name)
        output.name = name
        body.graph.output.append(output)


def _connect(model: onnx.ModelProto, tensor: str, name: str) -> None:
    """Give a tensor a second name."""
    model.graph.node.append(helper.make_node("Identity", [tensor], [name]))


def _make_zeros(model: onnx.ModelProto, name: str) -> None:
    """Replace an input by zeros of input_ids' shape."""
    graph: Any = model.graph
    kept = [entry for entry in graph.input if entry.name != name]
    del graph.input[:]
    graph.input.extend(kept)
    zero = helper.make_tensor("", onnx.TensorProto.INT64, [1], [0])
    graph.node.insert(0, helper.make_node("ConstantOfShape", [f"{name}/shape"], [name], value=zero))
    graph.node.insert(0, helper.make_node("Shape", ["input_ids"], [f"{name}/shape"]))


def mark(path: Path, *keys: str) -> None:
    """Note in the model's metadata what an engine must know of it: PACKED, SPARSE_ROWS, STATIC."""
    model = onnx.load(path, load_external_data=False)
    helper.set_model_props(model, dict.fromkeys(keys, "true"))
    onnx.save(model, path)
