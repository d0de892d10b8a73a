"""What the client gives back: vectors with the facts needed to use them safely."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from halimede.inputs.content import InputKind
from halimede_ops.errors import HalimedeError

UNKNOWN_TOKENS = -1
"""Token count of a text whose provider does not tell it, and of an image."""
IMAGE = np.dtype([("width", "<i4"), ("height", "<i4"), ("format", "S8")])
"""What is told of an image: pixels as it is seen, and Pillow's name of its format. 0 and empty
where it is not told, and for texts."""


MAX_IMAGE_BYTES = 10 * 1024 * 1024
"""Largest encoded image that a model takes, unless it says another size."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as its provider describes it."""

    name: str
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims, 16 hex digits: vectors
    may be compared only within one space."""
    precision: str
    """fp32, fp16 or int8; `remote` where the provider does not tell."""
    dims: int
    """Length of a full vector."""
    max_tokens: int
    """Longest text in tokens; what lies beyond is cut off. 0: it takes no text."""
    max_batch_size: int
    """Most items in one request."""
    provider: str = "triton"
    """InputKind of provider."""
    mean_cosine: float | None = None
    """Mean cosine to the reference, as the build measured it; None where nobody recorded it."""
    version: str = ""
    """Version that names this content and no other; empty where versions do not."""
    input: InputKind = "text"
    """What it embeds."""
    image_model: str = ""
    """Name of the model that embeds images into the same space; empty: there is none."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Largest encoded image."""
    share: float = 0.0
    """Of a candidate: the share of its model's requests that it answers."""

    def is_alike(self, other: ServedModel) -> bool:
        """Whether vectors of both may stand in one result: same space and precision."""
        return (self.space, self.precision) == (other.space, other.precision)


class ImageInfo(NamedTuple):
    """What an image is, as the model told when it was embedded."""

    width: int
    """Pixels, as the image is seen: after its EXIF orientation. 0: not told."""
    height: int
    format: str
    """Pillow's name of the format, such as JPEG; empty: not told."""

    def __str__(self) -> str:
        return f"{self.format} {self.width} × {self.height}" if self.format else ""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of texts, images or pairs, in their order: all of one space and precision.

    There is one row an item. With `errors="collect"` items that failed have no row: `errors` has
    them, and `indices` says which item each row is.
    """

    vectors: np.ndarray
    """`[rows, dims]` of `output_type`; for `binary` and `ubinary` `[rows, dims / 8]` bytes."""
    tokens: np.ndarray
    """`[rows]` int32: tokens each whole text has, special tokens included; -1: not told."""
    model: str
    space: str
    precision: str
    max_tokens: int
    provider: str = "triton"
    """InputKind of provider whose model this is."""
    output_type: str = "float32"
    cached: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.bool_))
    """`[rows]` bool: whether the vector came from a cache."""
    indices: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """`[rows]` int64: which item of the call, or of the stream, each row is."""
    versions: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """`[rows]` int64: version of the model that gave each vector; 0: not told, as of one from a
    cache. A canary answers some of a call's items."""
    images: tuple[ImageInfo, ...] = ()
    """What each row's image is; none for texts."""
    errors: Mapping[int, HalimedeError] = dataclasses.field(default_factory=dict)
    """Item → what was wrong with it, of the items that have no row."""

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dims(self) -> int:
        """Components of each vector."""
        packed = self.output_type in ("binary", "ubinary")
        return int(self.vectors.shape[1]) * (8 if packed else 1)

    @property
    def truncated(self) -> np.ndarray:
        """`[rows]` bool: whether a text was longer than the model's limit and was cut off."""
        return self.tokens > self.max_tokens
