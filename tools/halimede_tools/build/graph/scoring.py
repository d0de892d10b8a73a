"""Scoring: a cross-encoder as a module that gives its scores as POOLED."""

from __future__ import annotations

from typing import Any

import torch

from halimede_ops.spec import POOLED, TOKEN_TYPES
from halimede_tools.build.graph import packing
from halimede_tools.build.kinds import chat


def scored(model: Any, activation: torch.nn.Module) -> torch.nn.Module:
    """The module to trace: it takes several pairs in a row if the architecture allows that."""
    transformer = model[0].auto_model
    if chat.is_decoder(model):
        return DecoderScores(model, activation)
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


class DecoderScores(torch.nn.Module):
    """A decoder and the activation of its answer: the logit of yes minus that of no, or the logit
    of yes alone, behind the last token of a row.
    """

    def __init__(self, model: Any, activation: torch.nn.Module) -> None:
        super().__init__()
        transformer, answer = model[0].auto_model, model[1]
        self.body = transformer.base_model
        head = transformer.get_output_embeddings()
        signs = {answer.true_token_id: 1.0}
        if answer.false_token_id is not None:
            signs[answer.false_token_id] = -1.0
        ids = list(signs)
        # All other rows of the head would be computed for nothing.
        self.head = torch.nn.Linear(head.in_features, len(ids), bias=head.bias is not None)
        self.head.weight = torch.nn.Parameter(head.weight[ids].detach().clone())
        if head.bias is not None:
            self.head.bias = torch.nn.Parameter(head.bias[ids].detach().clone())
        self.register_buffer("signs", torch.tensor(list(signs.values())))
        self.cap = getattr(transformer.config, "final_logit_softcapping", None)
        self.activation = activation

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows, 1]`."""
        ids, mask = features["input_ids"], features["attention_mask"]
        hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = (mask * torch.arange(mask.shape[1])).argmax(dim=-1)
        place = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits = self.head(hidden.gather(1, place)[:, 0])
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        features[POOLED] = self.activation((logits * self.signs).sum(dim=-1, keepdim=True))
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
