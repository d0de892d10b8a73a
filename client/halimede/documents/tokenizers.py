"""Tokenizers of served models, from a model repository on this machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halimede.config.environment import Settings
from halimede.extras import needs_extra
from halimede.providers.base import Options
from halimede.results import ServedModel
from halimede_ops import spec
from halimede_ops.errors import InvalidModel, ModelNotFound, SpaceRefused, UnsupportedInput
from halimede_repository import configs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from halimede_ops.text import TextTokenizer


class ModelTokenizer(NamedTuple):
    """The tokenizer of a model, and the model's spec."""

    tokenizer: Tokenizer
    """It truncates nothing."""
    spec: spec.ModelSpec
    reader: TextTokenizer
    """It reads texts as the model does: with prompts, and no more than the model takes."""


def folder_of(options: Options, served: ServedModel, input_type: str | None = None) -> Path:
    """Return the folder of the tokenizer that a served model has for texts of an input type.

    It is in the model repository that the model is run from, or for a model on Triton in the
    repository on this machine, if that has the model in the served space.

    Raises:
        UnsupportedInput: the model is of another provider.
        ModelNotFound: the repository on this machine has no such model.
        SpaceRefused: the repository on this machine has another model of this name.
    """
    from halimede.providers import onnx
    from halimede.providers.triton import provider as triton

    name = options.model_id
    if not isinstance(options, (triton.Options, onnx.Options)):
        raise UnsupportedInput(
            f"{name} is of another provider, which gives no tokenizer. Use a model that Triton "
            "serves, or one of a model repository."
        )
    is_local = isinstance(options, onnx.Options)
    repository = Path(options.path) if is_local else Settings().repository  # type: ignore[union-attr]
    try:
        facts, folder = _find(repository, name, input_type)
    except (ModelNotFound, InvalidModel, KeyError):
        raise ModelNotFound(
            f"the tokenizer of {name} is not on this machine. Set HALIMEDE_REPOSITORY to the model "
            "repository that its server has."
        ) from None
    if facts.space != served.space:
        raise SpaceRefused(
            f"the model repository on this machine has a {name} of space {facts.space}, and space "
            f"{served.space} is served. Set HALIMEDE_REPOSITORY to the server's repository."
        )
    return folder


def _find(repository: Path, name: str, input_type: str | None) -> tuple[spec.ModelSpec, Path]:
    """Return the spec of a model, and the folder of its tokenizer for texts of an input type."""
    ensemble = configs.read(repository, name)
    facts = spec.load(ensemble.folder)
    if not facts.routes:
        return facts, ensemble.steps[f"{facts.name}-tokenizer"]
    tower = configs.parameter(ensemble.config, f"{facts.tower(input_type)}_model")
    return facts, _find(repository, tower, None)[1]


@functools.lru_cache(maxsize=16)
def read(folder: Path) -> ModelTokenizer:
    """Read the tokenizer of a folder.

    Raises:
        InvalidModel: a file is missing or damaged.
        MissingExtra: the package tokenizers is not installed.
    """
    with needs_extra("documents"):
        from tokenizers import Tokenizer
    from halimede_ops import text

    facts = spec.load(folder)
    tokenizer: Any = Tokenizer.from_file(str(folder / text.FILE_NAME))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = facts.splits_special_tokens
    return ModelTokenizer(tokenizer, facts, text.load(folder, facts))
