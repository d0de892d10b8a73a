"""Tokenizers of served models, from a model repository on this machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from halimede.config.environment import Settings
from halimede.extras import needs_extra
from halimede.gateway.errors import Problem
from halimede.gateway.models.served import Model
from halimede.providers import onnx
from halimede.providers.triton import provider as triton
from halimede_ops import spec
from halimede_ops.errors import HalimedeError
from halimede_repository import configs

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ModelTokenizer(NamedTuple):
    """A tokenizer that truncates nothing, and the spec of its model."""

    tokenizer: Tokenizer
    spec: spec.ModelSpec


async def tokenizer_of(model: Model) -> ModelTokenizer:
    """Return the tokenizer of a served model.

    Raises:
        Problem: the repository on this machine has not this model, or has another one of its name.
        MissingExtra: the package tokenizers is not installed.
    """
    served = await model.facts()
    options = model.options
    if not isinstance(options, (triton.Options, onnx.Options)):
        raise Problem(501, f"{model.name} is of another provider, which tells no tokenizer.")
    is_local = isinstance(options, onnx.Options)
    repository = Path(options.path) if is_local else Settings().repository  # type: ignore[union-attr]
    try:
        ensemble = configs.read(repository, options.model_id)
        facts = spec.load(ensemble.folder)
        folder = ensemble.steps[f"{facts.name}-tokenizer"]
    except (HalimedeError, KeyError):
        raise Problem(
            501,
            f"the tokenizer of {model.name} is not on this machine. Set HALIMEDE_REPOSITORY to the "
            "model repository that its server has.",
        ) from None
    if facts.space != served.space:
        raise Problem(
            501,
            f"the model repository on this machine has a {model.name} of space {facts.space}, and "
            f"space {served.space} is served. Set HALIMEDE_REPOSITORY to the server's repository.",
        )
    return ModelTokenizer(_read(folder, facts.splits_special_tokens), facts)


@functools.lru_cache(maxsize=16)
def _read(folder: Path, splits_special_tokens: bool) -> Tokenizer:
    with needs_extra("onnx"):
        from tokenizers import Tokenizer
    from halimede_ops.text import FILE_NAME

    tokenizer = Tokenizer.from_file(str(folder / FILE_NAME))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = splits_special_tokens
    return tokenizer
