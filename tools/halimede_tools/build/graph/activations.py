"""Activations: the values that MatMuls of a graph take, over many inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime

from halimede_engine import cores

FROM_MATMUL = ("MatMul", "Gemm")
SAMPLED_ROWS = 2048
"""Rows that are kept of each activation. The extremes are those of all rows."""

Feeds = Sequence[Mapping[str, np.ndarray]]


class Activation(NamedTuple):
    """The values of one tensor: for texts, a row is a token."""

    low: np.ndarray
    """Lowest value of each channel, `[channels]` float32."""
    high: np.ndarray
    """Highest value of each channel, `[channels]` float32."""
    sample: np.ndarray
    """Random rows, `[rows, channels]` float32."""

    def without(self, channels: Sequence[int]) -> Activation:
        """The activation with 0 in these channels."""
        low, high, sample = (values.copy() for values in self)
        for values in (low, high, sample):
            values[..., channels] = 0
        return Activation(low, high, sample)


def of_matmuls(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Activation]:
    """The input of each MatMul that has constant weights, by the name of the MatMul."""
    weights = {weight.name for weight in model.graph.initializer}
    inputs = {
        node.name: node.input[0]
        for node in model.graph.node
        if node.op_type in FROM_MATMUL and node.input[1] in weights
    }
    if not inputs:
        return {}
    observed = _observe(model, sorted(set(inputs.values())), feeds)
    return {node: observed[name] for node, name in inputs.items()}


def _observe(model: onnx.ModelProto, names: list[str], feeds: Feeds) -> dict[str, Activation]:
    """The activations of the named tensors. One feed is in memory at a time."""
    run = _session(model, names).run
    chance = np.random.default_rng(0)
    kept_rows = -(-SAMPLED_ROWS // len(feeds))
    parts: dict[str, list[Activation]] = {name: [] for name in names}
    for feed in feeds:
        for name, values in zip(names, run(names, feed), strict=True):
            rows = np.asarray(values).reshape(-1, values.shape[-1])
            sample = rows[chance.permutation(len(rows))[:kept_rows]]
            parts[name].append(Activation(rows.min(axis=0), rows.max(axis=0), sample))
    return {
        name: Activation(
            np.min([part.low for part in observed], axis=0),
            np.max([part.high for part in observed], axis=0),
            np.concatenate([part.sample for part in observed]),
        )
        for name, observed in parts.items()
    }


def _session(model: onnx.ModelProto, names: Sequence[str]) -> onnxruntime.InferenceSession:
    extended = copy.deepcopy(model)
    del extended.graph.output[:]
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cores.available()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        extended.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
