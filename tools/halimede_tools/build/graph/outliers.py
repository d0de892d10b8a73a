"""Outliers: channels whose values are so large that INT8 would have no steps left for the others.

In transformers one or two channels between a feed-forward block's two MatMuls hold values ten
times the rest, at one token of a text. Their way through the block is taken apart from the others'
and stays in FP32: a few columns of the first MatMul, a few rows of the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from halimede_tools.build.graph import rewrite

APART = "outliers/"
"""Begins the names of the nodes on the way that stays in FP32."""
MOST_CHANNELS = 8
WORTH_LOSS = 0.002
"""Loss below which a MatMul is well enough as it is."""
ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Erf", "Relu", "Sigmoid", "Tanh", "Pow", "Gelu", "Clip",
)  # fmt: skip


def rounding_loss(values: np.ndarray) -> float:
    """Energy of INT8's rounding error over that of the values about their channels' means:
    `[tokens, channels]` float32. Outliers widen the range that 255 steps must cover.
    """
    step = float(max(0.0, values.max()) - min(0.0, values.min())) / 255 or 1.0
    error = np.square(np.round(values / step) * step - values).sum()
    return float(error / max(np.square(values - values.mean(axis=0)).sum(), 1e-12))


def channels(values: np.ndarray) -> list[int]:
    """The fewest channels, at most MOST_CHANNELS, without which `[tokens, channels]` values lose
    less than half; empty where that is not worth it or not to be had.
    """
    loss = rounding_loss(values)
    largest = np.argsort(np.abs(values).max(axis=0))[::-1]
    count = 1
    while loss > WORTH_LOSS and count <= MOST_CHANNELS:
        left = values.copy()
        left[:, largest[:count]] = 0
        if rounding_loss(left) < loss / 2:
            return sorted(int(channel) for channel in largest[:count])
        count *= 2
    return []


def take_apart(model: onnx.ModelProto, found: Mapping[str, Sequence[int]]) -> list[str]:
    """Give these input channels of MatMuls, by the MatMul's name, a way of their own; the names of
    those where the way back to a MatMul is none of plain elementwise operators are left out.
    """
    changed = _Graph(model)
    apart = [name for name, chosen in found.items() if changed.take_apart(name, list(chosen))]
    rewrite.drop_unused_constants(model)
    return apart


class _Graph:
    """A model's graph, to be changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph: Any = model.graph
        self.constants = {entry.name: entry for entry in self.graph.initializer}
        self.made_by = {name: node for node in self.graph.node for name in node.output}
        self.nodes = {node.name: node for node in self.graph.node}

    def take_apart(self, name: str, chosen: list[int]) -> bool:
        """Whether the MatMul's channels could be, and now are, taken apart."""
        second = self.nodes[name]
        way = self._way(second.input[0]) if second.op_type == "MatMul" else []
        if not way or not self._is_private(way, second):
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
        for node in way:
            self._blank_constants(node, chosen, f"{prefix}{node.name.strip('/')}")
        place = list(self.graph.node).index(second) + 1
        for node in reversed(nodes):
            self.graph.node.insert(place, node)
        return True

    def _way(self, tensor: str) -> list[Any]:
        """The nodes that a tensor comes through from MatMuls, all others elementwise; empty where
        there are others.
        """
        node = self.made_by.get(tensor)
        if node is None:
            return []
        if node.op_type == "MatMul" and node.input[1] in self.constants:
            return [node]
        inputs = [name for name in node.input if name and name not in self.constants]
        ways = [self._way(name) for name in inputs]
        if node.op_type not in ELEMENTWISE or not ways or not all(ways):
            return []
        found = [node, *(one for way in ways for one in way)]
        return [one for place, one in enumerate(found) if one not in found[:place]]

    def _is_private(self, way: list[Any], second: Any) -> bool:
        """Whether nothing but `second` uses what the nodes of the way give."""
        inside = {name for node in way for name in node.output}
        users = [node for node in self.graph.node if inside & set(node.input)]
        return all(node in way or node == second for node in users)

    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def _slice(self, tensor: str, chosen: list[int], prefix: str, nodes: list[Any]) -> str:
        """The name of a tensor's channels, made by nodes of their own."""
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
        """A vector over the channels, cut to those chosen; what all channels share as it is."""
        if not name or self._array(name).size == 1:
            return name
        return self._constant(self._array(name)[..., chosen], new)

    def _blank_constants(self, node: Any, chosen: list[int], new: str) -> None:
        """Let a node of the way give nothing large in these channels."""
        if node.op_type == "MatMul":
            self._blank(node, 1, chosen, f"{new}/columns", axis=1)
        elif node.op_type == "Add":
            for place, name in enumerate(node.input):
                if name in self.constants and self._array(name).size > 1:
                    self._blank(node, place, chosen, f"{new}/{place}", axis=-1)

    def _blank(self, node: Any, place: int, chosen: list[int], new: str, axis: int) -> None:
        """Set a constant's rows or columns to zero, for this node alone."""
        values = self._array(node.input[place]).copy()
        np.moveaxis(values, axis, 0)[chosen] = 0
        node.input[place] = self._constant(values, new)

    def _constant(self, values: np.ndarray, name: str) -> str:
        entry = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.graph.initializer.append(entry)
        self.constants[name] = entry
        return name
