"""Imaging: encoders of images as modules that turn pixels into vectors."""

from __future__ import annotations

from typing import Any

import torch

from halimede_ops.spec import CLS, MEAN, POOLED, TOKEN_EMBEDDINGS, ImageSpec


class Modules(torch.nn.Module):
    """A SentenceTransformer that takes images: a model with two towers, or any with modules of its
    own.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(list(model))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Pixel values `[rows, 3, height, width]` float32 → vectors `[rows, dims]` float32."""
        features: dict[str, Any] = {"pixel_values": values, "modality": "image"}
        for step in self.steps:
            features = step(features)
        vectors: torch.Tensor = features[POOLED]
        return vectors

    def positions(self, values: torch.Tensor) -> int:
        """Positions of the last hidden state; 1 if the first module pools them."""
        features = self.steps[0]({"pixel_values": values, "modality": "image"})
        return int(features[TOKEN_EMBEDDINGS].shape[1]) if TOKEN_EMBEDDINGS in features else 1


class Backbone(torch.nn.Module):
    """A transformers model that takes images alone, and one of POOLINGS of its outputs."""

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        if isinstance(getattr(model, "pooler", None), torch.nn.AvgPool2d):
            # EfficientNet's kernel is always larger than the picture, which OpenVINO refuses.
            model.pooler = torch.nn.AdaptiveAvgPool2d(1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Pixel values `[rows, 3, height, width]` float32 → vectors `[rows, dims]` float32."""
        outputs = self.model(pixel_values=values)
        if self.pooling not in (CLS, MEAN):
            vectors: torch.Tensor = outputs[self.pooling].flatten(1)
            return vectors
        hidden = _hidden(outputs)
        return hidden[:, 0] if self.pooling == CLS else hidden.mean(dim=1)

    def positions(self, values: torch.Tensor) -> int:
        """Positions of the last hidden state."""
        return int(_hidden(self.model(pixel_values=values)).shape[1])


def _hidden(outputs: Any) -> torch.Tensor:
    """The last hidden state of a model's outputs: `[rows, positions, width]`. Convolutions give
    `[rows, width, height, width]`.
    """
    hidden: torch.Tensor = outputs.last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


class Scaled(torch.nn.Module):
    """An encoder of images behind the scaling of pixels."""

    def __init__(self, encoder: torch.nn.Module, image: ImageSpec) -> None:
        super().__init__()
        self.encoder = encoder
        std = torch.tensor(image.std)[:, None, None]
        self.scale = image.scale / std
        self.shift = torch.tensor(image.mean)[:, None, None] / std
        self.bgr = image.bgr

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `[rows, 3, height, width]` uint8 in RGB order → vectors `[rows, dims]` float32."""
        values = pixels.float() * self.scale - self.shift
        vectors: torch.Tensor = self.encoder(values.flip(1) if self.bgr else values)
        return vectors


class FixedPositions:
    """The position table of a model for images of one size.

    A model whose images differ from those it was trained with interpolates its table for each call.
    As the served size is fixed, the table is computed once, by PyTorch.
    """

    def __init__(self, interpolate: Any) -> None:
        self.interpolate = interpolate
        self.table: torch.Tensor | None = None

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        """What `interpolate` gave for its first arguments."""
        if self.table is None:
            self.table = self.interpolate(*args, **options).detach()
        return self.table


def fix_positions(encoder: torch.nn.Module, image: ImageSpec) -> None:
    """Replace the interpolation of position tables by its result for images of this size."""
    for module in encoder.modules():
        interpolate = getattr(module, "interpolate_pos_encoding", None)
        if callable(interpolate):
            module.interpolate_pos_encoding = FixedPositions(interpolate)  # type: ignore[assignment]
    encoder(torch.zeros(1, 3, image.height, image.width))
