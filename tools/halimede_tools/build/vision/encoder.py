"""Encoder: a model's folder to the module that embeds its images, and its ModelSpec.

A model with two towers gives its own image features. A model such as ViT or DINOv2 takes images
alone: the vector of a plain transformers folder is `pooler_output`, what transformers' pipeline
`image-feature-extraction` gives with `pool=True`, if the folder has weights for the pooler or the
pooler needs none. Otherwise it is the class token of the last hidden state, or the mean of all
positions for a model without one. A folder of sentence-transformers has modules that say it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import (
    CLS,
    DENSE,
    IMAGE_EMBEDS,
    MEAN,
    OWN_FEATURES,
    POOLER_OUTPUT,
    ImageSpec,
    ModelSpec,
)
from halimede_repository.checksums import sha256
from halimede_tools.build import describe
from halimede_tools.build.describe import IGNORED_KEYS, ModelOptions
from halimede_tools.build.keys import key_of
from halimede_tools.build.kinds import contents
from halimede_tools.build.kinds.files import read_json
from halimede_tools.build.kinds.recognise import PREPROCESSING, takes_images_alone
from halimede_tools.build.vision import processor, two_towers

CLASS_TOKENS = ("cls_token", "class_embedding")
"""Ends of the names of a class token's weights."""
PIXEL_VALUES = "pixel_values"


class ImageEncoder(NamedTuple):
    """What embeds the images of a loaded model."""

    module: Any
    """Pixel values `[rows, 3, height, width]` float32 → vectors `[rows, dims]` float32."""
    spec: ModelSpec


def load(folder: Path, options: ModelOptions) -> ImageEncoder:
    """What embeds the images of the model in `folder`, on the CPU.

    Raises:
        InvalidModel: the folder is damaged, or its model or its preprocessing is not supported.
        UntrustedCode: it carries Python code and `options` does not trust it.
    """
    from halimede_tools.build.graph import imaging

    if takes_images_alone(folder):
        return _load_alone(folder, options)
    model = describe.load(folder, options)
    return ImageEncoder(imaging.Modules(model).eval(), describe.describe(model, folder, options))


def image_processor(folder: Path, name: str) -> Any:
    """The transformers processor of a folder's images.

    Raises:
        InvalidModel: as `processor.image_processor`.
    """
    towers = two_towers.config(folder)
    return processor.image_processor(folder, name, None if towers is None else towers[1])


def _load_alone(folder: Path, options: ModelOptions) -> ImageEncoder:
    from halimede_tools.build.graph import imaging

    describe.check_modules(folder, options.name)
    describe.check_trusted(folder, options)
    _check_options(options)
    prepared = image_processor(folder, options.name)
    image = processor.image_spec(prepared, options.name)
    pooling, normalised = OWN_FEATURES, False
    if (folder / "modules.json").exists():
        model = describe.open_model(folder, options)
        normalised = type(list(model)[-1]).__name__ == "Normalize"
        module: Any = imaging.Modules(model)
    else:
        model, missing = _backbone(folder, options)
        pooling = _pooling(model, image, missing, options.name)
        module = imaging.Backbone(model, pooling)
    dims, positions = _measured(module, image, options.name)
    image = dataclasses.replace(image, pooling=pooling, positions=positions)
    fields: dict[str, Any] = {
        "dims": dims,
        "max_tokens": 0,
        "normalised": normalised,
        "prompts": {},
        "layer_norm_before_cut": options.layer_norm_before_cut,
    }
    spec = ModelSpec(
        name=options.name,
        space=_space(folder, image, fields),
        image=image,
        matryoshka=options.matryoshka,
        length_buckets=(),
        **fields,
    )
    return ImageEncoder(module.eval(), spec)


def _check_options(options: ModelOptions) -> None:
    """Raise if an option for texts was given."""
    given = {
        "max_tokens": options.max_tokens,
        "prompts": options.prompts,
        "token_embeddings": options.token_embeddings,
        "late_chunking": options.late_chunking,
        "kind": options.kind not in (None, DENSE),
    }
    for option, value in given.items():
        if value:
            raise InvalidModel(f"{options.name} takes images alone: leave {option} out.")


def _backbone(folder: Path, options: ModelOptions) -> tuple[Any, list[str]]:
    """The transformers model, and the names of its weights that the folder lacks."""
    import torch
    import transformers

    architecture = str((read_json(folder / "config.json").get("architectures") or [""])[0])
    # AutoModel leaves out the projection, which the vectors of such a model have.
    named = getattr(transformers, architecture, None) if "Projection" in architecture else None
    try:
        with describe.quiet():
            model, loaded = (named or transformers.AutoModel).from_pretrained(
                folder,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=options.trust_remote_code,
                dtype=torch.float32,
                attn_implementation="eager",
            )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise InvalidModel(f"{options.name} cannot be read ({_reason(error, folder)}).") from error
    if model.main_input_name != PIXEL_VALUES:
        raise InvalidModel(
            f"{options.name} is a {type(model).__name__}, which takes texts, and its folder has no "
            "tokenizer. Add the tokenizer's files from where the model was published."
        )
    return model.eval(), sorted(loaded["missing_keys"])


def _pooling(model: Any, image: ImageSpec, missing: Sequence[str], name: str) -> str:
    """Which of a model's outputs is its vector: one of POOLINGS.

    Raises:
        InvalidModel: the folder lacks weights that are not the pooler's, or the model gives no
            vector for an image of this size.
    """
    lost = [weight for weight in missing if "pooler" not in weight.split(".")]
    if lost:
        raise InvalidModel(
            f"{name} lacks {len(lost)} of its weights, such as {lost[0]}: fetch the folder again."
        )
    outputs = _run(lambda values: model(pixel_values=values), image, name)
    if IMAGE_EMBEDS in outputs:
        return IMAGE_EMBEDS
    if outputs.get(POOLER_OUTPUT) is not None and not missing:
        return POOLER_OUTPUT
    if outputs.get("last_hidden_state") is None:
        raise InvalidModel(
            f"{name} is a {type(model).__name__}, which gives no vector of an image."
        )
    names = [weight for weight, _ in model.named_parameters()]
    return CLS if any(weight.endswith(CLASS_TOKENS) for weight in names) else MEAN


def _measured(module: Any, image: ImageSpec, name: str) -> tuple[int, int]:
    """Length of a vector, and positions of the last hidden state."""
    dims = int(_run(module, image, name).shape[-1])
    return dims, int(_run(module.positions, image, name))


def _run(call: Callable[[Any], Any], image: ImageSpec, name: str) -> Any:
    """What a call gives for one black image of the size that the processor gives.

    Raises:
        InvalidModel: the model does not take it.
    """
    import torch

    try:
        with torch.no_grad(), describe.quiet():
            return call(torch.zeros(1, 3, image.height, image.width))
    except Exception as error:  # models raise what they like, and torch its own
        raise InvalidModel(
            f"{name} does not take the images of its {PREPROCESSING}, {image.width} x "
            f"{image.height} pixels ({_reason(error)})."
        ) from error


def _reason(error: Exception, folder: Path | None = None) -> str:
    """The first line of what a library says, without the folder's path."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line.replace(str(folder), 'the folder') if folder else line}"


def _space(folder: Path, image: ImageSpec, fields: dict[str, Any]) -> str:
    """Fingerprint of everything that decides a vector, from the folder's own files."""
    configs = {
        str(path.relative_to(folder)): {
            key: value for key, value in read_json(path).items() if key not in IGNORED_KEYS
        }
        for pattern in ("config.json", "sentence_*_config.json")
        for path in sorted(folder.rglob(pattern))
    }
    modules = folder / "modules.json"
    decides = {
        "weights": [sha256(path) for path in contents.weights(folder)],
        "modules": read_json(modules) if modules.exists() else [],
        "configs": configs,
        "image": image.decides(),
        **fields,
    }
    return key_of(json.dumps(decides, sort_keys=True))
