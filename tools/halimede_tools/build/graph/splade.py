"""SPLADE: a sparse model as a module that gives the weight of each token of the vocabulary.

A model for masked language modelling has a logit for each token of a text and each token of the
vocabulary. For one text of 512 tokens and a vocabulary of 250,002 that is half a gigabyte. So the
vocabulary is divided into parts, which are pooled one after the other: an engine needs the memory
of one part's logits at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from halimede_ops.spec import POOLED, TOKEN_EMBEDDINGS
from halimede_tools.build.graph import packing

PART = 4096
"""Tokens of the vocabulary in one part. Its logits have 8 MB for a run of 512 tokens."""


def sparse(model: Any) -> torch.nn.Module:
    """The module to trace for a SparseEncoder."""
    modules = list(model)
    if type(modules[-1]).__name__ == "SparseAutoEncoder":
        encoder = Encoder(modules[-1], model.max_active_dims)
        return packing.packed([*modules[:-1], encoder]) or torch.nn.Sequential(
            *modules[:-1], encoder
        )
    transformer, pooling = modules
    return Splade(transformer, pooling, model.max_active_dims)


class Splade(torch.nn.Module):
    """A SparseEncoder of a model for masked language modelling and SpladePooling."""

    def __init__(self, transformer: Any, pooling: Any, max_active_dims: int | None) -> None:
        super().__init__()
        decoder = _without_decoder(transformer.auto_model)
        self.transformer = transformer
        self.fill = _Fill()
        self.parts = torch.nn.ModuleList(
            _Part(decoder, start, pooling) for start in range(0, decoder.out_features, PART)
        )
        self.pool = _Join(pooling, max_active_dims)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows, vocabulary]`."""
        mask = features["attention_mask"] > 0
        features = self.transformer(features)
        hidden = self.fill(features[TOKEN_EMBEDDINGS], mask)  # what the decoder makes logits of
        features[POOLED] = self.pool([part(hidden, mask) for part in self.parts], hidden, mask)
        return features


def _without_decoder(transformer: Any) -> Any:
    """Remove the last layer of a model for masked language modelling, which makes the logits of a
    token, and return it. The model then gives that layer's input.
    """
    last = transformer.get_output_embeddings()
    for parent in list(transformer.modules()):
        for name, child in list(parent.named_children()):
            if child is last:
                setattr(parent, name, torch.nn.Identity())
    return last


class _Fill(torch.nn.Module):
    """Hidden states `[rows, tokens, width]` with that of a text's first token in place of padding.

    Padding then changes no maximum, and the logits need no mask: OpenVINO 2025.4 keeps the memory
    of each masked part until the end of the run, and takes twice as long.
    """

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states of the same shape; mask `[rows, tokens]` bool."""
        first = mask.int().argmax(dim=1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return torch.where(mask[:, :, None], hidden, hidden.gather(1, first))


class _Part(torch.nn.Module):
    """The pooled logits of a part of the vocabulary."""

    def __init__(self, decoder: Any, start: int, pooling: Any) -> None:
        super().__init__()
        rows = slice(start, start + PART)
        weight = decoder.weight.detach()[rows]
        self.decoder = torch.nn.Linear(weight.shape[1], weight.shape[0])
        bias = torch.zeros(len(weight)) if decoder.bias is None else decoder.bias.detach()[rows]
        self.decoder.load_state_dict({"weight": weight, "bias": bias})
        self.pool = _Sum(pooling) if pooling.pooling_strategy == "sum" else _Max()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.pool(self.decoder(hidden), mask)
        return pooled


class _Max(torch.nn.Module):
    """Logits `[rows, tokens, n]` → the largest of each text, `[rows, n]`. The activation never
    decreases: it is computed once for a text, not for each token.
    """

    def forward(self, logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits.amax(dim=1)


class _Sum(torch.nn.Module):
    """Logits `[rows, tokens, n]` → the sum of the weights of a text's tokens, `[rows, n]`."""

    def __init__(self, pooling: Any) -> None:
        super().__init__()
        self.activation = _Activation(pooling)

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counted = mask[:, None, :].to(logits.dtype)
        return (counted @ self.activation(logits))[:, 0]


class _Activation(torch.nn.Module):
    """log(1 + relu(x)), or log(1 + log(1 + relu(x))), of logits."""

    def __init__(self, pooling: Any) -> None:
        super().__init__()
        self.twice = pooling.activation_function == "log1p_relu"

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        weights = torch.log1p(torch.relu(logits))
        return torch.log1p(weights) if self.twice else weights


class _Join(torch.nn.Module):
    """The weights of the whole vocabulary, from its pooled parts."""

    def __init__(self, pooling: Any, max_active_dims: int | None) -> None:
        super().__init__()
        is_sum = pooling.pooling_strategy == "sum"
        self.activation = torch.nn.Identity() if is_sum else _Activation(pooling)
        self.largest = Largest(max_active_dims)

    def forward(
        self, parts: list[torch.Tensor], hidden: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        has_tokens = mask.any(dim=1, keepdim=True).to(hidden.dtype)
        weights = self.activation(torch.cat(parts, dim=-1)) * has_tokens
        # An engine's relu and maximum turn NaN into 0: a text with NaN would have no weights.
        mean = hidden.mean(dim=(1, 2))[:, None]
        joined: torch.Tensor = self.largest(weights) + (mean - mean)
        return joined


class Largest(torch.nn.Module):
    """Keeps the largest weights of each row, and sets the others to 0. None keeps all."""

    def __init__(self, count: int | None) -> None:
        super().__init__()
        self.count = count

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights that are kept, `[rows, dims]`."""
        if self.count is None or self.count >= weights.shape[-1]:
            return weights
        values, ids = torch.topk(weights, self.count, dim=-1)
        return torch.zeros_like(weights).scatter(-1, ids, values)


class Encoder(torch.nn.Module):
    """A SparseAutoEncoder as it encodes: without its decoder, which only training uses."""

    def __init__(self, encoder: Any, max_active_dims: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = Largest(max_active_dims)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features with POOLED, `[rows, hidden dimensions of the encoder]`."""
        dense, _ = self.encoder.prepare(features[POOLED])
        latents = torch.relu(self.encoder.encode_pre_act(dense))
        # relu of an engine turns NaN into 0.
        mean = dense.mean(dim=-1, keepdim=True)
        features[POOLED] = self.pool(latents) + (mean - mean)
        return features
