"""Packing: a model that takes several texts in one row.

The values of the attention mask number the texts of a row from 1. A token attends only to its own
text, has the position it would have if its text began the row, and each text is pooled on its own.
With a mask of 0 and 1 a row holds one text, and its vector is the same as without packing.
"""

from __future__ import annotations

from typing import Any

import torch

from halimede_ops.spec import POOLED, TOKEN_EMBEDDINGS

ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "camembert")
"""Encoders that accept a mask per pair of tokens, and a position per token."""
POOLINGS = ("mean", "cls")


def packed(model: Any) -> Packed | None:
    """A loaded model that takes several texts in a row; None if its modules do not allow that."""
    pooling = model[1] if len(model) > 1 else None
    possible = (
        takes_packed(model[0].auto_model.config)
        and type(pooling).__name__ == "Pooling"
        and pooling_mode(pooling) in POOLINGS
    )
    return Packed(model) if possible else None


def takes_packed(config: Any) -> bool:
    """Whether a transformer accepts a mask per pair of tokens, and a position per token."""
    return (
        config.model_type in ARCHITECTURES
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
    )


def padding_id(transformer: Any) -> int | None:
    """The id from which the RoBERTa family counts positions; None for BERT, which counts from 0."""
    is_bert = transformer.config.model_type == "bert"
    return None if is_bert else int(transformer.embeddings.padding_idx)


def places(
    ids: torch.Tensor,
    texts: torch.Tensor,
    padding_id: int | None,
    numbers: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens attend to which, `[rows, tokens, tokens]` bool, and the position of each in its
    own text, `[rows, tokens]` int64. `ids` and `texts`, the mask, are `[rows, tokens]` int64.

    `numbers` has the number of each token's text if `texts` is not above 0 for tokens that no token
    attends to.
    """
    own = texts if numbers is None else numbers
    same = (own[:, :, None] == own[:, None, :]) & (own[:, None, :] > 0)
    attended = same if numbers is None else same & (texts[:, None, :] > 0)
    if padding_id is None:
        return attended, positions_in_text(own)
    return attended, positions_of_roberta(ids, same, padding_id)


def pooling_mode(pooling: Any) -> str:
    """The mode of a Pooling; empty if it has several."""
    mode = pooling.pooling_mode
    return mode if isinstance(mode, str) else mode[0] if len(mode) == 1 else ""


class Packed(torch.nn.Module):
    """A SentenceTransformer that takes rows of several texts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.transformer = model[0]
        self.pool = Pool(pooling_mode(model[1]))
        self.after = torch.nn.ModuleList(list(model)[2:])
        self.padding_id = padding_id(model[0].auto_model)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows * places of a row, dims]`: the texts of a row in order of
        their numbers, then unused places. All rows have the same number of places: 1 if each has
        one text.
        """
        ids, texts = features["input_ids"], features["attention_mask"]
        same, positions = places(ids, texts, self.padding_id)
        asked = {"input_ids": ids, "attention_mask": same.long(), "position_ids": positions}
        features = self.transformer(asked)
        features["attention_mask"] = texts
        features[POOLED] = self.pool(features[TOKEN_EMBEDDINGS], texts)
        for module in self.after:
            features = module(features)
        return features


STEP = 8
"""A row has one place per text, rounded up to 1 plus a multiple of this."""


class Pool(torch.nn.Module):
    """Pools each text of a row on its own."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(
        self, hidden: torch.Tensor, texts: torch.Tensor, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states `[rows, tokens, width]`, the mask → `[rows * places of a row, width]`.

        `counts` `[rows, tokens]` has 0 for tokens that are in no mean.
        """
        # Few different numbers (1, 9, 17, …): engines compile and keep kernels for each.
        most: Any = (texts.max() + STEP - 2) // STEP * STEP + 1
        numbers = 1 + torch.arange(most)
        own = texts[:, None, :] == numbers[None, :, None]
        if self.mode == "cls":
            first = own.int().argmax(dim=-1, keepdim=True).expand(-1, -1, hidden.shape[-1])
            return hidden.gather(1, first).flatten(0, 1)
        weights = own.to(hidden.dtype)
        if counts is not None:
            weights = weights * counts[:, None, :]
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        return (weights @ hidden).flatten(0, 1)


def positions_in_text(texts: torch.Tensor) -> torch.Tensor:
    """Each token's distance from the end of the text before its own: `[rows, tokens]` int64.

    Masked tokens before a text count, as they do for BERT.
    """
    index = torch.arange(texts.shape[1], device=texts.device)
    before = (texts[:, None, :] > 0) & (texts[:, None, :] < texts[:, :, None])
    starts = (before * (index + 1)).amax(dim=-1)
    return index - starts


def positions_of_roberta(ids: torch.Tensor, same: torch.Tensor, padding_id: int) -> torch.Tensor:
    """Each token's number among those of its text that are not `padding_id`, counted from
    `padding_id` + 1; `padding_id` for one that is: `[rows, tokens]` int64.
    """
    counted = ids != padding_id
    earlier = torch.ones_like(same[0]).tril()
    numbers = (same & earlier & counted[:, None, :]).sum(dim=-1)
    return numbers * counted + padding_id
