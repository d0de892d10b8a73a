"""Lookup: a static model as a module that takes several texts in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
