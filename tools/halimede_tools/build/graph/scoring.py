"""Scoring: a cross-encoder as a module that gives its scores as POOLED."""

from __future__ import annotations

from typing import Any

import torch

from halimede_ops.spec import POOLED, TOKEN_TYPES
from halimede_tools.build.graph import packing


def scored(model: Any, activation: torch.nn.Module) -> torch.nn.Module:
    """The module to trace: it takes several pairs in a row if the architecture allows that."""
    transformer = model[0].auto_model
    head = getattr(transformer, "classifier", None)
    if len(model) > 1 or head is None or not packing.takes_packed(transformer.config):
        return Scores(model, activation)
    return PackedScores(transformer, activation)


class Scores(torch.nn.Module):
    """A CrossEncoder and the activation of its scores."""

    def __init__(self, model: Any, activation: torch.nn.Module) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(list(model))
        self.activation = activation

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows, labels]`."""
        for module in self.steps:
            features = module(features)
        features[POOLED] = self.activation(features["scores"])
        return features


class PackedScores(torch.nn.Module):
    """A model for sequence classification that takes rows of several pairs of texts."""

    def __init__(self, transformer: Any, activation: torch.nn.Module) -> None:
        super().__init__()
        self.body = transformer.base_model
        self.head = transformer.classifier
        self.pool = packing.Pool("cls")
        self.padding_id = packing.padding_id(self.body)
        self.activation = activation

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows * places of a row, labels]`, in the order of Packed."""
        ids, texts = features["input_ids"], features["attention_mask"]
        same, positions = packing.places(ids, texts, self.padding_id)
        types = {TOKEN_TYPES: features[TOKEN_TYPES]} if TOKEN_TYPES in features else {}
        hidden = self.body(
            input_ids=ids, attention_mask=same.long(), position_ids=positions, **types
        ).last_hidden_state
        first = self.pool(hidden, texts)[:, None, :]  # the first token of each pair
        pooler = getattr(self.body, "pooler", None)
        features[POOLED] = self.activation(self.head(first if pooler is None else pooler(first)))
        return features
