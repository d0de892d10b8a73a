"""Lookup: a static model as a module that takes several texts in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper

from halimede_engine import session
from halimede_ops.spec import POOLED
from halimede_tools.build.graph import packing, rewrite
from halimede_tools.build.kinds import static

OPSET = 18


class Mean(torch.nn.Module):
    """The mean of the vectors of each text's tokens, and the modules after it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        table = static.table(model)
        self.embedding = torch.nn.Embedding.from_pretrained(table.vectors)  # type: ignore[no-untyped-call]
        counts = torch.ones(len(table.vectors), dtype=torch.int64)
        if table.left_out is not None:
            counts[table.left_out] = 0
        self.counts = torch.nn.Parameter(counts, requires_grad=False)
        self.is_whole = table.left_out is None
        self.pool = packing.Pool("mean")
        self.after = torch.nn.ModuleList(list(model)[1:])

    def forward(self, ids: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Token ids and the mask, `[rows, tokens]` int64 → `[rows * places of a row, dims]`."""
        # The number of places is that of all texts, also of those whose tokens are left out.
        pooled = self.pool(self.embedding(ids), texts, None if self.is_whole else self.counts[ids])
        features = {POOLED: pooled}
        for module in self.after:
            features = module(features)
        return features[POOLED]


@torch.no_grad()
def trace(model: Any, path: Path) -> None:
    """Trace a static model, from tokens to the mean vector."""
    axes = {0: "batch_size", 1: "sequence_length"}
    torch.onnx.export(
        Mean(model).eval(),
        (torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)),
        str(path),
        input_names=list(rewrite.INPUTS),
        output_names=[POOLED],
        dynamic_axes={**dict.fromkeys(rewrite.INPUTS, axes), POOLED: {0: "batch_size"}},
        opset_version=OPSET,
        dynamo=False,
    )
    rewrite.mark(path, session.PACKED, session.STATIC)


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
