"""What a served model is: read from the `spec.json` its build wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halimede_ops.errors import InvalidModel, UnknownInputType

FILE_NAME = "spec.json"
POOLED = "sentence_embedding"
"""Output of every model.onnx the build writes: pooled vectors `[batch, dims]` float32."""
PIXELS = "pixels"
"""Input of a vision tower's model.onnx: `[batch, 3, height, width]` uint8."""
SPARSE = "sparse_weights"
"""Head of some models: one weight a token, `[batch, tokens, 1]` float32, none below 0."""
MULTI_VECTOR = "multi_vectors"
"""Head of some models: one vector a token, `[batch, tokens, width]` float32."""
TOKEN_EMBEDDINGS = "token_embeddings"  # noqa: S105
"""The last hidden state, `[batch, tokens, width]` float32, for models that are asked for it."""


MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_IMAGE_PIXELS = 64_000_000


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What a model's vision tower takes: of its `preprocessor_config.json`."""

    height: int
    """Of the pixels given to the model: what is cropped from the middle of the resized picture."""
    width: int
    resize: tuple[int, ...]
    """The shortest edge after resizing, or height and width; empty: not resized."""
    resample: int
    """Filter for resizing, by Pillow's number."""
    scale: float
    """Pixels 0 … 255 are multiplied by this, `mean` is subtracted, then divided by `std`: all
    within the model's graph, so that a picture travels as bytes."""
    mean: tuple[float, ...]
    """Of red, green and blue."""
    std: tuple[float, ...]
    positions: int
    """Positions of the vision tower, one a patch and one for the class: a picture costs as much as
    a text of so many tokens."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Largest encoded picture accepted."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Most pixels of a picture, as it is and as it is resized. Pillow takes 4 bytes for each, twice
    while a picture is turned or converted."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The facts of one model that tokenizing and pooling need; equal for all its precisions."""

    name: str
    """Name it is served under, without a precision suffix."""
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims, 16 hex digits.
    Vectors of two models may be compared only when their spaces are equal."""
    dims: int
    """Length of a full vector."""
    max_tokens: int
    """Longest input in tokens, special tokens included; what lies beyond is cut off."""
    normalised: bool
    """Whether vectors have L2 norm 1 (before and after truncation to fewer dimensions)."""
    prompts: Mapping[str, str]
    """Input type → text put in front. `query` and `document` are always present."""
    default_input_type: str | None = None
    """Input type of a request that names none; None: nothing is put in front."""
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Further outputs of the model, one row a token: name (SPARSE, …) → width of a row."""
    special_ids: tuple[int, ...] = ()
    """Ids of the tokens that begin, end, pad or replace text: they have no sparse weight."""
    matryoshka: tuple[int, ...] = ()
    """Dimensions that the model was trained to be cut to; any other is accepted too."""
    layer_norm_before_cut: bool = False
    """Whether vectors are layer-normalised before they are cut to fewer dimensions."""
    length_buckets: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Token lengths that rows are padded to for a backend that computes its padding; ascending,
    the last is `max_tokens`."""
    max_text_bytes: int = 4 * 1024 * 1024
    """Largest text accepted, in bytes of UTF-8."""
    image: ImageSpec | None = None
    """What its images must be; None: it takes texts alone."""

    def prompt(self, input_type: str | None) -> str:
        """Text to put in front of an input of this type.

        Raises:
            UnknownInputType: the model has no such prompt.
        """
        name = input_type or self.default_input_type
        if name is None:
            return ""
        try:
            return self.prompts[name]
        except KeyError:
            known = ", ".join(sorted(self.prompts))
            # The value given is the caller's own text: it is not repeated.
            raise UnknownInputType(
                f"the input type given is not one of {self.name}'s: {known}. Omit it for none."
            ) from None

    def images(self) -> ImageSpec:
        """What its images must be.

        Raises:
            InvalidModel: it takes texts alone.
        """
        if self.image is None:
            raise InvalidModel(f"{self.name} takes no images.")
        return self.image

    def to_json(self) -> str:
        """The text of `spec.json`: indented, keys in field order, ends with a newline."""
        fields = dataclasses.asdict(self)
        if self.image is None:
            del fields["image"]
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def load(folder: Path) -> ModelSpec:
    """ModelSpec from `spec.json` in a version folder of the repository.

    Raises:
        InvalidModel: the file is missing, not JSON, or not a spec.
    """
    try:
        fields: dict[str, Any] = json.loads((folder / FILE_NAME).read_text("utf-8"))
        for name in ("length_buckets", "special_ids", "matryoshka"):
            fields[name] = tuple(fields[name])
        if "image" in fields:
            fields["image"] = _image(fields["image"])
        return ModelSpec(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidModel(
            f"{FILE_NAME} cannot be read ({type(error).__name__}); build the model again"
        ) from error


def _image(fields: dict[str, Any]) -> ImageSpec:
    lists = {name: tuple(fields[name]) for name in ("resize", "mean", "std")}
    return ImageSpec(**fields | lists)
