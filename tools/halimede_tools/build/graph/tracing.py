"""Tracing: a loaded PyTorch model to a raw ONNX graph. The one module of the build that needs torch
when it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx import export as optimum_export
from optimum.exporters.onnx.model_configs import SentenceTransformersTransformerOnnxConfig
from optimum.exporters.onnx.model_patcher import ModelPatcher

from halimede_engine.session import PACKED, SPARSE_ROWS
from halimede_ops import spec
from halimede_ops.spec import PIXELS, POOLED, TOKEN_TYPES, ImageSpec, ModelSpec
from halimede_tools.build import describe
from halimede_tools.build.checks import spans
from halimede_tools.build.graph import imaging, late, packing, padding, rewrite, scoring, splade
from halimede_tools.build.kinds import windows
from halimede_tools.build.vision import two_towers

TOKEN_INPUTS = ("input_ids", "attention_mask")


@torch.no_grad()
def trace(model: Any, outputs: list[str], path: Path, token_types: bool = False) -> None:
    """Trace a whole model with optimum, whose patches make every architecture's masks traceable.

    optimum's own command exports sentence-transformers' models too, but not CLIP's text tower
    alone and no further heads.
    """
    config = getattr(model[0].auto_model.config, "text_config", model[0].auto_model.config)
    if two_towers.pads_texts(model):
        _export(padding.PaddedTexts(model), config, list(TOKEN_INPUTS), outputs, path)
        return
    packed = packing.packed(model)
    inputs = [*TOKEN_INPUTS, *([TOKEN_TYPES] if token_types else [])]
    _export(model if packed is None else packed, config, inputs, outputs, path)
    if packed is not None:
        rewrite.mark(path, PACKED)


@torch.no_grad()
def trace_scores(model: Any, activation: torch.nn.Module, facts: ModelSpec, path: Path) -> None:
    """Trace a CrossEncoder, from the tokens of pairs to their scores as POOLED."""
    module = scoring.scored(model, activation)
    inputs = [*TOKEN_INPUTS, *([TOKEN_TYPES] if facts.token_types else [])]
    _export(module, model[0].auto_model.config, inputs, [POOLED], path)
    if isinstance(module, scoring.PackedScores):
        rewrite.mark(path, PACKED)


@torch.no_grad()
def trace_sparse(model: Any, path: Path) -> None:
    """Trace a SparseEncoder, from tokens to the weights of its vocabulary as POOLED."""
    module = splade.sparse(model)
    _export(module, model[0].auto_model.config, list(TOKEN_INPUTS), [POOLED], path)
    is_packed = isinstance(module, packing.Packed)
    rewrite.mark(path, SPARSE_ROWS, *([PACKED] if is_packed else []))


@torch.no_grad()
def trace_late(model: Any, path: Path) -> None:
    """Trace a late-interaction model, from tokens to a vector for each."""
    module = late.LateVectors(model)
    outputs = [spec.MULTI_VECTOR, POOLED]
    _export(module, model[0].auto_model.config, list(TOKEN_INPUTS), outputs, path)
    if module.is_packed:
        rewrite.mark(path, PACKED)


def _export(
    module: torch.nn.Module, config: Any, inputs: list[str], outputs: list[str], path: Path
) -> None:
    # optimum asks the module for its config, as every transformers model has one.
    module.config = config
    with windows.traceable():
        optimum_export(module, _Config(config, "feature-extraction", inputs, outputs), path)


@torch.no_grad()
def trace_images(encoder: torch.nn.Module, image: ImageSpec, path: Path) -> None:
    """Trace an encoder of images, from pixels as bytes to the vector."""
    imaging.fix_positions(encoder, image)
    torch.onnx.export(
        imaging.Scaled(encoder, image).eval(),
        (torch.zeros(2, 3, image.height, image.width, dtype=torch.uint8),),
        str(path),
        input_names=[PIXELS],
        output_names=[POOLED],
        dynamic_axes={PIXELS: {0: "batch_size"}, POOLED: {0: "batch_size"}},
        opset_version=_Config.DEFAULT_ONNX_OPSET,
        dynamo=False,
    )


class _Patcher(ModelPatcher):  # type: ignore[misc]
    """Calls the model with its features as two tensors."""

    def __init__(self, config: _Config, model: Any, model_kwargs: Any) -> None:
        super().__init__(config, model, model_kwargs)

        def forward(
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> dict[str, Any]:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                given[TOKEN_TYPES] = token_type_ids
            features = self.orig_forward(given)
            return {name: features[name] for name in config.outputs}

        self.patched_forward = forward


class _Config(SentenceTransformersTransformerOnnxConfig):  # type: ignore[misc]
    """The inputs and outputs that this model has."""

    _MODEL_PATCHER = _Patcher

    def __init__(self, config: Any, task: str, inputs: list[str], outputs: list[str]) -> None:
        super().__init__(config, task)
        self._inputs = inputs
        self._outputs = outputs

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of each input, in order."""
        return {name: {0: "batch_size", 1: "sequence_length"} for name in self._inputs}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of each output, in order."""
        return {name: _axes(name) for name in self._outputs}


@torch.no_grad()
def trace_tail(modules: list[Any], outputs: list[str], body: Any, path: Path) -> None:
    """Trace the modules after a transformer: hidden state and mask to `outputs`."""
    width = next(
        output.type.tensor_type.shape.dim[-1].dim_value
        for output in body.graph.output
        if output.name == spec.TOKEN_EMBEDDINGS
    )
    axes = {0: "batch_size", 1: "sequence_length"}
    torch.onnx.export(
        _Tail(modules, outputs).eval(),
        (torch.randn(2, 8, width), torch.ones(2, 8, dtype=torch.int64)),
        str(path),
        input_names=[rewrite.HIDDEN, rewrite.MASK],
        output_names=outputs,
        dynamic_axes={
            rewrite.HIDDEN: axes,
            rewrite.MASK: axes,
            **{name: _axes(name) for name in outputs},
        },
        opset_version=rewrite.opset(body),
        dynamo=False,
    )


class _Tail(torch.nn.Module):
    """The modules after a transformer, called with tensors."""

    def __init__(self, modules: list[Any], outputs: list[str]) -> None:
        super().__init__()
        self.after = torch.nn.ModuleList(modules)
        self.outputs = outputs

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features: dict[str, Any] = {spec.TOKEN_EMBEDDINGS: hidden, "attention_mask": mask}
        for module in self.after:
            features = module(features)
        return tuple(features[name] for name in self.outputs)


def _axes(output: str) -> dict[int, str]:
    """The dynamic axes of an output: rows, and tokens where it has a row for each."""
    return {0: "batch_size"} if output == POOLED else {0: "batch_size", 1: "sequence_length"}


def add_heads(model: Any, source: Path, facts: ModelSpec) -> None:
    """Append the model's further heads, so that they come from the same pass."""
    if facts.late is not None:
        return
    if spec.SPARSE in facts.heads:
        model.append(_Head(source / describe.SPARSE_FILE, spec.SPARSE, torch.nn.ReLU()))
    if spec.MULTI_VECTOR in facts.heads:
        model.append(_Head(source / describe.MULTI_VECTOR_FILE, spec.MULTI_VECTOR, _Unit()))
    if spec.POOLED_TOKENS in facts.heads:
        model.append(_PooledTokens(spans.layers(model, facts.name)))


class _Head(torch.nn.Module):
    """A linear layer over every token's hidden state, as bge-m3's."""

    def __init__(self, path: Path, name: str, activation: torch.nn.Module) -> None:
        super().__init__()
        state = describe.head_weights(path)
        outputs, inputs = state["weight"].shape
        self.linear = torch.nn.Linear(inputs, outputs)
        self.linear.load_state_dict({key: value.float() for key, value in state.items()})
        self.activation = activation
        self.output = name

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        hidden = features[spec.TOKEN_EMBEDDINGS]
        features[self.output] = self.activation(self.linear(hidden))
        return features


class _PooledTokens(torch.nn.Module):
    """What a mean pools, behind the linear layers that follow it: their order changes nothing."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        features[spec.POOLED_TOKENS] = self.layers(features[spec.TOKEN_EMBEDDINGS])
        return features


class _Unit(torch.nn.Module):
    """Vectors of L2 norm 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1)
