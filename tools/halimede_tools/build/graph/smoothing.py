"""Smoothing: scales the channels of a MatMul's input to similar ranges before quantisation.

One scale for all channels of an activation wastes INT8's 255 steps on the channels with small
values. SmoothQuant (Xiao et al., 2022, arXiv:2211.10438) divides channel j of the input by
`max|x_j|^alpha / max|w_j|^(1 - alpha)` and multiplies row j of the weights by the same number: the
product stays the same, and both are easier to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from halimede_tools.build.graph import rewrite
from halimede_tools.build.graph.activations import Activation

ALPHA = 0.75
"""Share of the difficulty that moves from the input to the weights. On 700 sentences, the default
model's mean cosine was 0.9976 for 0.75 and 0.85, 0.9958 for 0.6 and 0.9960 for 0.95."""
SMALLEST = 0.02
"""Smallest scale, as a share of the median: a channel that is nearly always 0 while calibrating
must not be blown up by a text that uses it."""
PREFIX = "smoothed/"


def smooth(model: onnx.ModelProto, observed: Mapping[str, Activation]) -> dict[str, Activation]:
    """Smooth the inputs of MatMuls; MatMul → its input afterwards. `observed` has those before.

    MatMuls that share an input, such as query, key and value, share its scales.
    """
    smoothed = dict(observed)
    graph: Any = model.graph
    constants = {entry.name: entry for entry in graph.initializer}
    sharing: dict[str, list[Any]] = {}
    for node in graph.node:
        if (
            node.op_type == "MatMul"
            and node.name in observed
            and len(constants[node.input[1]].dims) == 2
        ):
            sharing.setdefault(node.input[0], []).append(node)
    for tensor, matmuls in sharing.items():
        weights = [numpy_helper.to_array(constants[node.input[1]]) for node in matmuls]
        scales = channel_scales(observed[matmuls[0].name], np.concatenate(weights, axis=1))
        name = f"{PREFIX}{matmuls[0].name.strip('/')}"
        graph.initializer.append(numpy_helper.from_array(1 / scales, f"{name}/scales"))
        place = list(graph.node).index(matmuls[0])
        graph.node.insert(place, helper.make_node("Mul", [tensor, f"{name}/scales"], [name], name))
        for node, weight in zip(matmuls, weights, strict=True):
            scaled = f"{PREFIX}{node.name.strip('/')}/weights"
            graph.initializer.append(numpy_helper.from_array(weight * scales[:, None], scaled))
            node.input[0], node.input[1] = name, scaled
            smoothed[node.name] = Activation(*(part / scales for part in observed[node.name]))
    rewrite.drop_unused_constants(model)
    return smoothed


def channel_scales(activation: Activation, weights: np.ndarray) -> np.ndarray:
    """The divisor of each input channel, `[channels]` float32 with median 1; weights `[channels,
    outputs]`.
    """
    largest = np.maximum(-activation.low, activation.high)
    heaviest = np.abs(weights).max(axis=1)
    used = (largest > 0) & (heaviest > 0)
    scales = np.ones(len(largest))
    scales[used] = largest[used] ** ALPHA / heaviest[used] ** (1 - ALPHA)
    scales[used] /= np.median(scales[used])
    return np.maximum(scales, SMALLEST).astype(np.float32)
