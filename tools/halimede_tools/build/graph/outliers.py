"""Outliers: channels whose values are so large that INT8's 255 steps are too coarse for the others.

In transformers, one or two channels between the two MatMuls of a feed-forward block hold values ten
times the rest, at one token of a text. These channels get a branch of their own that stays in FP32:
a few columns of the first MatMul, a few rows of the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from halimede_tools.build.graph import rewrite
from halimede_tools.build.graph.activations import Activation

APART = "outliers/"
"""Begins the names of the nodes in the FP32 branch."""
MAX_CHANNELS = 8
MIN_LOSS = 0.002
"""Rounding loss below which a MatMul is left as it is."""
ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Erf", "Relu", "Sigmoid", "Tanh", "Pow", "Gelu", "Clip",
)  # fmt: skip


def rounding_loss(activation: Activation) -> float:
    """Energy of INT8's rounding error divided by the variance of the channels. Outliers widen the
    range that 255 steps must cover.
    """
    low, high, values = activation
    step = float(max(0.0, high.max()) - min(0.0, low.min())) / 255 or 1.0
    error = np.square(np.round(values / step) * step - values).sum()
    return float(error / max(np.square(values - values.mean(axis=0)).sum(), 1e-12))


def channels(activation: Activation) -> list[int]:
    """The fewest channels, at most MAX_CHANNELS, without which the rounding loss halves; empty if
    the loss is below MIN_LOSS or no such channels exist.
    """
    loss = rounding_loss(activation)
    largest = np.argsort(np.maximum(-activation.low, activation.high))[::-1]
    count = 1
    while loss > MIN_LOSS and count <= MAX_CHANNELS:
        if rounding_loss(activation.without(largest[:count].tolist())) < loss / 2:
            return sorted(int(channel) for channel in largest[:count])
        count *= 2
    return []


def take_apart(model: onnx.ModelProto, found: Mapping[str, Sequence[int]]) -> list[str]:
    """Move input channels of MatMuls into an FP32 branch; the names of the MatMuls that could be
    changed. `found` is MatMul → channels. A MatMul can be changed if only elementwise operators lie
    between it and the MatMul before.
    """
    changed = _Graph(model)
    apart = [name for name, chosen in found.items() if changed.take_apart(name, list(chosen))]
    rewrite.drop_unused_constants(model)
    return apart


class _Graph:
    """The graph of a model, with indices for changing it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph: Any = model.graph
        self.constants = {entry.name: entry for entry in self.graph.initializer}
        self.made_by = {name: node for node in self.graph.node for name in node.output}
        self.nodes = {node.name: node for node in self.graph.node}

    def take_apart(self, name: str, chosen: list[int]) -> bool:
        """Move channels of a MatMul into an FP32 branch; False if that is not possible."""
        second = self.nodes[name]
        path = self._path(second.input[0]) if second.op_type == "MatMul" else []
        if not path or not self._is_private(path, second):
            return False
        prefix = f"{APART}{name.strip('/')}/"
        nodes: list[Any] = []
        few = self._slice(second.input[0], chosen, prefix, nodes)
        rows = self._constant(self._array(second.input[1])[chosen], f"{prefix}rows")
        rest, whole = f"{prefix}rest", second.output[0]
        second.output[0] = rest
        nodes += [
            helper.make_node("MatMul", [few, rows], [f"{prefix}part"], f"{prefix}MatMul"),
            helper.make_node("Add", [rest, f"{prefix}part"], [whole], f"{prefix}Add"),
        ]
        self._blank(second, 1, chosen, f"{prefix}others", axis=0)
        for node in path:
            self._blank_constants(node, chosen, f"{prefix}{node.name.strip('/')}")
        place = list(self.graph.node).index(second) + 1
        for node in reversed(nodes):
            self.graph.node.insert(place, node)
        return True

    def _path(self, tensor: str) -> list[Any]:
        """The nodes between the MatMuls before a tensor and the tensor, the MatMuls included; empty
        if one of the others is not elementwise.
        """
        node = self.made_by.get(tensor)
        if node is None:
            return []
        if node.op_type == "MatMul" and node.input[1] in self.constants:
            return [node]
        inputs = [name for name in node.input if name and name not in self.constants]
        paths = [self._path(name) for name in inputs]
        if node.op_type not in ELEMENTWISE or not paths or not all(paths):
            return []
        nodes = [node, *(one for path in paths for one in path)]
        return [one for place, one in enumerate(nodes) if one not in nodes[:place]]

    def _is_private(self, path: list[Any], second: Any) -> bool:
        """Whether only `second` uses the outputs of the path."""
        inside = {name for node in path for name in node.output}
        users = [node for node in self.graph.node if inside & set(node.input)]
        return all(node in path or node == second for node in users)

    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def _slice(self, tensor: str, chosen: list[int], prefix: str, nodes: list[Any]) -> str:
        """Name of a tensor with only the chosen channels, computed by new nodes."""
        node = self.made_by[tensor]
        name = f"{prefix}{tensor.strip('/')}"
        if any(name in made.output for made in nodes):
            return name
        if node.op_type == "MatMul":
            columns = self._constant(self._array(node.input[1])[:, chosen], f"{name}/columns")
            inputs = [node.input[0], columns]
        else:
            inputs = [
                self._sliced_constant(one, chosen, f"{name}/{number}")
                if one in self.constants or not one
                else self._slice(one, chosen, prefix, nodes)
                for number, one in enumerate(node.input)
            ]
        made = helper.make_node(node.op_type, inputs, [name], name)
        made.attribute.extend(node.attribute)
        nodes.append(made)
        return name

    def _sliced_constant(self, name: str, chosen: list[int], new: str) -> str:
        """Name of a constant with only the chosen channels; a scalar stays as it is."""
        if not name or self._array(name).size == 1:
            return name
        return self._constant(self._array(name)[..., chosen], new)

    def _blank_constants(self, node: Any, chosen: list[int], new: str) -> None:
        """Set the weights of a node that produce these channels to zero."""
        if node.op_type == "MatMul":
            self._blank(node, 1, chosen, f"{new}/columns", axis=1)
        elif node.op_type == "Add":
            for place, name in enumerate(node.input):
                if name in self.constants and self._array(name).size > 1:
                    self._blank(node, place, chosen, f"{new}/{place}", axis=-1)

    def _blank(self, node: Any, place: int, chosen: list[int], new: str, axis: int) -> None:
        """Set rows or columns of a constant to zero, for this node only."""
        values = self._array(node.input[place]).copy()
        np.moveaxis(values, axis, 0)[chosen] = 0
        node.input[place] = self._constant(values, new)

    def _constant(self, values: np.ndarray, name: str) -> str:
        entry = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.graph.initializer.append(entry)
        self.constants[name] = entry
        return name
