"""Results of the client: vectors and scores with the facts that are needed to use them safely."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from halimede.inputs.content import InputKind, ModelKind, OutputKind
from halimede_ops.errors import HalimedeError

UNKNOWN_TOKENS = -1
"""Token count of images, and of texts whose provider does not count tokens."""
IMAGE = np.dtype([("width", "<i4"), ("height", "<i4"), ("format", "S8")])
"""Size of an image in pixels, after its EXIF orientation, and Pillow's name of its format. 0 and
empty if unknown, and for texts."""
MAX_IMAGE_BYTES = 10 * 1024 * 1024
"""Largest encoded image of a model that sets no limit of its own."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as its provider describes it."""

    name: str
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims, 16 hex digits. Vectors
    can be compared only within one space."""
    precision: str
    """fp32, fp16 or int8. `remote` if the provider does not report it."""
    dims: int
    """Length of a full vector. Of a reranker 1, of a classifier the number of its labels, of a
    sparse model the size of its vocabulary, of a late-interaction model the width of a vector."""
    max_tokens: int
    """Token limit of a text or text pair; the rest is cut off. 0 if the model takes no texts."""
    max_batch_size: int
    """Maximum inputs in one request."""
    provider: str = "triton"
    """Kind of provider."""
    mean_cosine: float | None = None
    """Mean cosine to the reference, measured by the build. None if it was not measured."""
    version: str = ""
    """Version that identifies this content. Empty if the provider has no such versions."""
    input: InputKind = "text"
    """Kind of inputs that it embeds."""
    image_model: str = ""
    """Name of the model that embeds images into the same space. Empty if there is none."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Largest encoded image."""
    share: float = 0.0
    """For a candidate: share of the model's requests that it answers, 0 to 1."""
    kind: ModelKind = "dense"
    """What it is."""
    outputs: tuple[OutputKind, ...] = ("vector",)
    """What it gives, its own output first. A dense model with further heads gives several."""
    labels: tuple[str, ...] = ()
    """Names of a classifier's labels, in the order of its scores."""

    query_tokens: int = 0
    """Token limit of a query, of a late-interaction model whose queries have one of their own. 0:
    it is `max_tokens`."""

    arithmetic: str = ""
    """Arithmetic that it computes in, such as bf16. Empty if the provider does not report it."""
    candidate: ServedModel | None = None
    """The candidate that may answer a share of this model's requests. None if there is none."""

    def token_limit(self, input_type: str | None) -> int:
        """Token limit of a text of this input type."""
        is_query = input_type == "query"
        return self.query_tokens if is_query and self.query_tokens else self.max_tokens

    def is_alike(self, other: ServedModel) -> bool:
        """Whether vectors of both can be in one result: they have one space and precision."""
        return (self.space, self.precision) == (other.space, other.precision)


class ImageInfo(NamedTuple):
    """Size and format of an image, from the model that embedded it."""

    width: int
    """Pixels, after the EXIF orientation. 0 if unknown."""
    height: int
    format: str
    """Pillow's name of the format, such as JPEG. Empty if unknown."""

    def __str__(self) -> str:
        return f"{self.format} {self.width} × {self.height}" if self.format else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Facts that every result has, of one model in one space and precision.

    Each input has one row. With `errors="collect"`, inputs that failed have none: `errors` has
    their errors, and `indices` the input of each row.
    """

    tokens: np.ndarray
    """`[rows]` int32: tokens of each whole text, or of both texts of a pair, special tokens
    included. -1 if unknown. Of a text of more than 65,536 characters perhaps a lower bound, above
    `max_tokens`."""
    model: str
    space: str
    precision: str
    max_tokens: int
    provider: str = "triton"
    """Kind of provider."""
    cached: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.bool_))
    """`[rows]` bool: whether the row came from a cache."""
    indices: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """`[rows]` int64: index of each row's input in the call or stream."""
    versions: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """`[rows]` int64: model version of each row; a canary may answer some inputs of a call. 0 if
    unknown, as for rows from a cache."""
    errors: Mapping[int, HalimedeError] = dataclasses.field(default_factory=dict)
    """Index of an input without a row → its error."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def truncated(self) -> np.ma.MaskedArray[Any, np.dtype[np.bool_]]:
        """`[rows]` bool: whether a text exceeded the model's token limit and was cut off.

        Masked where the number of tokens is unknown.
        """
        is_unknown = (self.tokens == UNKNOWN_TOKENS) & (self.max_tokens > 0)
        return np.ma.masked_array(self.tokens > self.max_tokens, is_unknown)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class Embeddings(Result):
    """Embeddings of texts, images or pairs, in their order, with one space and precision."""

    vectors: np.ndarray
    """`[rows, dims]` of `output_type`; for `binary` and `ubinary` `[rows, dims / 8]` bytes."""
    _: dataclasses.KW_ONLY
    output_type: str = "float32"
    dims: int = 0
    """Components of each vector. Default: as many as `vectors` can hold."""
    images: tuple[ImageInfo, ...] = ()
    """Size and format of each row's image. Empty for texts."""

    def __post_init__(self) -> None:
        if not self.dims:
            is_packed = self.output_type in ("binary", "ubinary")
            dims = int(self.vectors.shape[1]) * (8 if is_packed else 1)
            object.__setattr__(self, "dims", dims)


@dataclasses.dataclass(frozen=True)
class DocumentEmbeddings(Embeddings):
    """Embeddings of the parts of documents, such as chunks, in their order.

    `tokens` counts each part alone.
    """

    _: dataclasses.KW_ONLY
    spans: np.ndarray
    """`[rows, 2]` int64: start and end of each part, in characters of its document:
    `document[start:end]` is the part."""
    late: bool = False
    """Whether each document was read as a whole (late chunking): then no part was cut off."""

    @property
    def documents(self) -> np.ndarray:
        """`[rows]` int64: index of the document of each row in the call."""
        return self.indices

    @property
    def truncated(self) -> np.ma.MaskedArray[Any, np.dtype[np.bool_]]:
        """`[rows]` bool: whether a part exceeded the model's token limit and was cut off."""
        cut_off = super().truncated
        return np.ma.masked_array(np.zeros(len(self), np.bool_)) if self.late else cut_off  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseEmbeddings(Result):
    """Sparse embeddings of texts, in their order: weights of some tokens of the vocabulary.

    The similarity of two texts is the sum, over the ids that both have, of the products of their
    weights.
    """

    ids: tuple[np.ndarray, ...]
    """For each row `[n]` int32: ids of tokens, ascending, each once."""
    weights: tuple[np.ndarray, ...]
    """For each row `[n]` float32: the weight of each id, above 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiEmbeddings(Result):
    """Multi-vectors of texts, in their order: one vector for each token.

    `halimede.maxsim` compares them.
    """

    vectors: tuple[np.ndarray, ...]
    """For each row `[n, width]` float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores(Result):
    """Scores of text pairs by a reranker, in their order. A higher score is a better match."""

    scores: np.ndarray
    """`[rows]` float32."""


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A document in a ranking."""

    index: int
    """Index of the document in the call."""
    score: float
    document: str | None = None
    """The document itself, if the call asked for documents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Scores):
    """Documents by their relevance to a query, the best first. Iterates over `Ranked`.

    Each row is a document: `indices` has its index in the call, `scores` its score. Documents of
    equal score are in the order of the call.
    """

    documents: tuple[str, ...] | None = None
    """The document of each row, if the call asked for documents."""

    def __iter__(self) -> Iterator[Ranked]:
        documents = self.documents or [None] * len(self)
        for index, score, document in zip(self.indices, self.scores, documents, strict=True):
            yield Ranked(int(index), float(score), document)

    def __getitem__(self, rank: int) -> Ranked:
        document = None if self.documents is None else self.documents[rank]
        return Ranked(int(self.indices[rank]), float(self.scores[rank]), document)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Result):
    """Scores of texts, or of text pairs, for each label of a classifier, in their order."""

    labels: tuple[str, ...]
    """Names of the labels."""
    scores: np.ndarray
    """`[rows, labels]` float32."""

    @property
    def best(self) -> tuple[str, ...]:
        """The label with the highest score of each row."""
        return tuple(self.labels[place] for place in self.scores.argmax(axis=1))
