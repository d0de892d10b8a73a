"""Results of the client: vectors with the facts needed to use them safely."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from halimede.inputs.content import InputKind
from halimede_ops.errors import HalimedeError

UNKNOWN_TOKENS = -1
"""Token count of an image, and of a text whose provider does not report it."""
IMAGE = np.dtype([("width", "<i4"), ("height", "<i4"), ("format", "S8")])
"""An image's size in pixels after its EXIF orientation, and Pillow's name of its format. 0 and
empty if unknown, and for texts."""
MAX_IMAGE_BYTES = 10 * 1024 * 1024
"""Largest encoded image of a model that names no other size."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as its provider describes it."""

    name: str
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims, 16 hex digits. Only
    vectors of the same space can be compared."""
    precision: str
    """fp32, fp16 or int8; `remote` if the provider does not report it."""
    dims: int
    """Length of a full vector."""
    max_tokens: int
    """Longest text in tokens; longer texts are truncated. 0: it embeds no texts."""
    max_batch_size: int
    """Most items in one request."""
    provider: str = "triton"
    """Kind of provider."""
    mean_cosine: float | None = None
    """Mean cosine to the reference that the build measured; None if not recorded."""
    version: str = ""
    """Version that identifies the model's content; empty if the provider has no such versions."""
    input: InputKind = "text"
    """Kind of its inputs."""
    image_model: str = ""
    """Name of the model that embeds images into the same space; empty if there is none."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Largest encoded image."""
    share: float = 0.0
    """For a candidate: the share of its model's requests that it answers, 0 to 1."""

    def is_alike(self, other: ServedModel) -> bool:
        """Whether one result may contain vectors of both: same space and precision."""
        return (self.space, self.precision) == (other.space, other.precision)


class ImageInfo(NamedTuple):
    """Size and format of an image, as reported when it was embedded."""

    width: int
    """Pixels, after the EXIF orientation. 0: unknown."""
    height: int
    format: str
    """Pillow's name of the format, such as JPEG. Empty: unknown."""

    def __str__(self) -> str:
        return f"{self.format} {self.width} × {self.height}" if self.format else ""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of texts, images or pairs, in order, all of one space and precision.

    Each item has one row. With `errors="collect"`, items that failed have no row: `errors` has
    them, and `indices` says which item each row belongs to.
    """

    vectors: np.ndarray
    """`[rows, dims]` of `output_type`; for `binary` and `ubinary` `[rows, dims / 8]` bytes."""
    tokens: np.ndarray
    """`[rows]` int32: tokens of each text before truncation, with special tokens; -1: unknown."""
    model: str
    space: str
    precision: str
    max_tokens: int
    provider: str = "triton"
    """Kind of provider that answered."""
    output_type: str = "float32"
    cached: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.bool_))
    """`[rows]` bool: whether the vector came from a cache."""
    indices: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """`[rows]` int64: index in the call, or in the stream, of the item that each row belongs to."""
    versions: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """`[rows]` int64: model version that made each vector; a candidate may answer some items.
    0: unknown, as for vectors from a cache."""
    images: tuple[ImageInfo, ...] = ()
    """Size and format of each row's image; empty for texts."""
    errors: Mapping[int, HalimedeError] = dataclasses.field(default_factory=dict)
    """Index of an item without a row → its error."""

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dims(self) -> int:
        """Components of each vector."""
        packed = self.output_type in ("binary", "ubinary")
        return int(self.vectors.shape[1]) * (8 if packed else 1)

    @property
    def truncated(self) -> np.ndarray:
        """`[rows]` bool: whether a text was longer than the model's limit and was truncated."""
        return self.tokens > self.max_tokens
