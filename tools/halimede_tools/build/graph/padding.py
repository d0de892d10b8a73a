"""Padding: texts that a model sees padded to one length, whatever the length of the row."""

from __future__ import annotations

from typing import Any

import torch


class PaddedTexts(torch.nn.Module):
    """A SigLIP's text tower. It was trained with every text padded to one length and, unless its
    tokenizer gives a mask, without one: padding counts as text. The graph pads, so that rows of any
    length give the vector of the full length.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(list(model))
        limit = model[0].auto_model.config.text_config.max_position_embeddings
        self.limit = int(limit)
        self.masked = "attention_mask" in model.tokenizer.model_input_names
        self.padding = torch.full((1, self.limit), int(model.tokenizer.pad_token_id))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows, dims]`."""
        mask = features["attention_mask"]
        padding = self.padding.expand(mask.shape[0], self.limit)
        ids = features["input_ids"] * mask + padding[:, :1] * (1 - mask)
        features = {"input_ids": torch.cat([ids, padding], dim=1)[:, : self.limit]}
        if self.masked:
            rest = torch.zeros_like(padding)
            features["attention_mask"] = torch.cat([mask, rest], dim=1)[:, : self.limit]
        for step in self.steps:
            features = step(features)
        return features
