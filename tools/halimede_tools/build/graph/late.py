"""Late: a late-interaction model as a module that gives a vector of L2 norm 1 for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halimede_ops.spec import MULTI_VECTOR, POOLED, TOKEN_EMBEDDINGS
from halimede_tools.build.graph import packing


class LateModel(torch.nn.Sequential):
    """A transformer and the projections of its hidden states, with what a text's tokens are."""

    def __init__(self, transformer: Any, projections: Sequence[Projection], settings: Any) -> None:
        super().__init__(transformer, *projections)
        self.late = settings
        """The folder's `LateSettings`."""
        self.tokenizer = transformer.tokenizer
        self.max_seq_length = settings.document_tokens
        self.prompts = settings.prompts
        self.default_prompt_name = settings.default_prompt

    def get_embedding_dimension(self) -> int:
        """Width of a vector."""
        last: Any = self[-1]
        return int(last.linear.out_features)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[batch, tokens, width]` → vectors `[batch, tokens, dims]` of L2 norm 1."""
        for projection in list(self)[1:]:
            hidden = projection(hidden)
        return torch.nn.functional.normalize(hidden, dim=-1)


class Projection(torch.nn.Module):
    """A linear layer with an activation; `residual` is the weight of a layer beside it."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: torch.nn.Module,
        residual: torch.Tensor | None = None,
        *,
        adds_input: bool = False,
    ) -> None:
        super().__init__()
        self.linear = _linear(weight, bias)
        self.activation = activation
        self.residual: torch.nn.Module | None = torch.nn.Identity() if adds_input else None
        if residual is not None:
            self.residual = _linear(residual, None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[batch, tokens, width]` → `[batch, tokens, dims]`."""
        projected: torch.Tensor = self.activation(self.linear(hidden))
        return projected if self.residual is None else projected + self.residual(hidden)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    state = {"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()})
    layer.load_state_dict(state)
    return layer


class LateVectors(torch.nn.Module):
    """The module to trace: it takes several texts in a row if the architecture allows that.

    In the mask, -1 instead of 1 (in a packed row, the negative of a text's number) marks a token of
    the text that no token attends to.
    """

    def __init__(self, model: LateModel) -> None:
        super().__init__()
        self.model = model
        transformer: Any = model[0].auto_model
        self.is_packed = packing.takes_packed(transformer.config)
        self.padding_id = packing.padding_id(transformer) if self.is_packed else None
        self.pool = packing.Pool("cls")

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with MULTI_VECTOR, `[rows, tokens, dims]`, and POOLED, the vector of the first
        token of each text.
        """
        ids, mask = features["input_ids"], features["attention_mask"]
        texts = mask.abs()
        if self.is_packed:
            attended, positions = packing.places(ids, mask, self.padding_id, texts)
            asked = {"attention_mask": attended.long(), "position_ids": positions}
        else:
            asked = {"attention_mask": (mask > 0).long()}
        hidden = self.model[0]({"input_ids": ids, **asked})[TOKEN_EMBEDDINGS]
        vectors = self.model.project(hidden)
        pooled = self.pool(vectors, texts) if self.is_packed else vectors[:, 0]
        return {MULTI_VECTOR: vectors, POOLED: pooled}
