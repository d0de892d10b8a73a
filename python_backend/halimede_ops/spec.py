"""The facts of a served model, from the `spec.json` that its build wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halimede_ops.errors import InvalidModel, UnknownInputType

FILE_NAME = "spec.json"
DENSE, RERANKER, CLASSIFIER = "dense", "reranker", "classifier"
SPARSE_KIND, LATE_INTERACTION = "sparse", "late_interaction"
KINDS = (DENSE, RERANKER, CLASSIFIER, SPARSE_KIND, LATE_INTERACTION)
"""What a model gives for a text, or for a pair of texts: one vector; a score of relevance; a score
for each label; weights of the vocabulary's tokens; or a vector for each token."""
VECTOR_OUTPUTS = {DENSE: "EMBEDDING", RERANKER: "SCORE", CLASSIFIER: "SCORES"}
"""Kind → the output of its ensemble with one row of numbers for each input."""
POOLED = "sentence_embedding"
"""Output of every model.onnx: pooled vectors, or scores, `[batch, dims]` float32. Of a
late-interaction model it is the vector of the first token, which no client gets: it shows whether
a row is finite."""
TOKEN_TYPES = "token_type_ids"  # noqa: S105
"""Third input of some graphs: 0 for tokens of the first text of a pair, 1 for those of the second,
`[batch, tokens]` int64."""
PIXELS = "pixels"
"""Input of a vision tower's model.onnx: `[batch, 3, height, width]` uint8."""
SPARSE = "sparse_weights"
"""Head of some models: a weight of each token, `[batch, tokens, 1]` float32, never negative."""
MULTI_VECTOR = "multi_vectors"
"""Head of some models, and output of every late-interaction model: a vector of each token,
`[batch, tokens, width]` float32."""
KEPT = "kept"
"""Tensor between the steps of a late-interaction model: 1 for each token that has a vector in the
answer, `[batch, tokens]` int64."""
QUERY = "query"
"""Input type of queries."""
TOKEN_EMBEDDINGS = "token_embeddings"  # noqa: S105
"""Head of models built with it: the last hidden state, `[batch, tokens, width]` float32."""
POOLED_TOKENS = "pooled_tokens"
"""Head of models built for late chunking: of each token the vector whose mean over a text is the
text's pooled vector, `[batch, tokens, dims]` float32."""
SPANS = "spans"
"""Tensor between the steps of a model built for late chunking: the first token of each span and the
one behind its last, `[batch, spans, 2]` int64."""


MAX_TEXT_BYTES = 4 * 1024 * 1024
"""Maximum size of a text, in bytes of UTF-8, of a model whose `spec.json` names no other."""
MAX_REQUEST_BYTES = 8 * 1024 * 1024
"""Maximum size of all texts of one request, in bytes of UTF-8. halimede's client cuts its calls
into requests of this size."""
MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_IMAGE_PIXELS = 64_000_000
IMAGE_LIMITS = ("max_image_bytes", "max_image_pixels")
"""Fields of ImageSpec that decide nothing of the vectors."""
OWN_FEATURES, POOLER_OUTPUT, IMAGE_EMBEDS = "", "pooler_output", "image_embeds"
CLS, MEAN = "cls", "mean"
POOLINGS = (OWN_FEATURES, POOLER_OUTPUT, IMAGE_EMBEDS, CLS, MEAN)
"""Vectors of an image: the model's own image features, or what the modules of its folder give;
transformers' `pooler_output` or `image_embeds`; the first position of the last hidden state; or the
mean of all its positions."""


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The preprocessing of a vision tower, from the model's `preprocessor_config.json`."""

    height: int
    """Height of the model's input in pixels: the middle of the resized image is cropped to it."""
    width: int
    """Width of the model's input in pixels."""
    resize: tuple[int, ...]
    """Shortest edge after resizing, or height and width, in pixels; empty: no resizing."""
    resample: int
    """Pillow's number of the resizing filter."""
    scale: float
    """The model's graph computes `(pixel * scale - mean) / std` of pixels 0 … 255. Images are sent
    to the model as bytes."""
    mean: tuple[float, ...]
    """Mean of red, green and blue."""
    std: tuple[float, ...]
    """Standard deviation of red, green and blue."""
    positions: int
    """Positions of the vision tower's last hidden state. An image costs as much as a text of so
    many tokens."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Maximum size of an encoded image, in bytes."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Maximum pixels of an image, before and after resizing. Pillow uses 4 bytes for each pixel,
    and twice that while it rotates or converts an image."""
    bgr: bool = False
    """Whether the model's graph turns RGB into BGR. Images are sent to the model as RGB."""
    pooling: str = OWN_FEATURES
    """Which of the model's outputs is the vector: one of POOLINGS."""

    def decides(self) -> dict[str, Any]:
        """The fields that decide a vector, without those that have their default. A new field so
        does not change the space of models that do not use it.
        """
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in IMAGE_LIMITS and getattr(self, field.name) != field.default
        }


@dataclasses.dataclass(frozen=True)
class LateSpec:
    """How a late-interaction model reads queries and documents."""

    query_tokens: int
    """Token limit of a query, special tokens and its marker included."""
    document_tokens: int
    """Token limit of a document, special tokens and its marker included."""
    query_marker: int | None
    """Id of the token behind the first token of each query; None: there is none."""
    document_marker: int | None
    """The same of each document."""
    expansion: int | None
    """Id of the token that a query is filled up with to `query_tokens` (query expansion). None:
    queries keep their length."""
    attends_to_expansion: bool
    """Whether the tokens of a query attend to the tokens that fill it up. Those always attend to
    the query's own."""
    skipped_ids: tuple[int, ...]
    """Tokens of a document that have no vector in the answer: those of punctuation."""
    padding_id: int | None = None
    """Id of a token that a query's text cannot have: `expansion` takes its place."""

    @property
    def has_unattended(self) -> bool:
        """Whether queries are filled up with tokens that no token attends to."""
        return self.expansion is not None and not self.attends_to_expansion


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The facts of a model that tokenizing and pooling need. All its precisions share them."""

    name: str
    """Served name, without the suffix of a precision."""
    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims: 16 hexadecimal digits.
    Vectors of two models can be compared only if their spaces are equal."""
    dims: int
    """Dimensions of a full vector. Of a reranker 1, of a classifier the number of its labels, of a
    sparse model the size of its vocabulary, of a late-interaction model the width of a vector."""
    max_tokens: int
    """Token limit, special tokens included. Longer texts are truncated. 0: takes images alone."""
    normalised: bool
    """Whether vectors have L2 norm 1, also after truncation to fewer dimensions."""
    prompts: Mapping[str, str]
    """Input type → text to prepend. `query` and `document` are always present."""
    default_input_type: str | None = None
    """Input type of a request that names none; None: nothing is prepended."""
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Further outputs with one row for each token: name (SPARSE, …) → width of a row."""
    special_ids: tuple[int, ...] = ()
    """Ids of special tokens (start, end, padding, mask). They have no sparse weight."""
    matryoshka: tuple[int, ...] = ()
    """Dimensions that the model was trained to be truncated to. Others are accepted too."""
    layer_norm_before_cut: bool = False
    """Whether vectors are layer-normalised before they are truncated."""
    length_buckets: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Lengths in tokens that rows are padded to for a backend that computes padding. Ascending; the
    last is `max_tokens`."""
    max_text_bytes: int = MAX_TEXT_BYTES
    """Maximum size of a text, in bytes of UTF-8."""
    image: ImageSpec | None = None
    """The preprocessing of images; None: the model takes texts alone."""
    kind: str = DENSE
    """One of KINDS."""
    labels: tuple[str, ...] = ()
    """Names of a classifier's labels, in the order of its scores."""
    splits_special_tokens: bool = False
    """Whether the name of a special token in a text is tokenized as any other word."""
    static: bool = False
    """Whether the model has no transformer: a text's vector is the mean of its tokens' vectors."""
    token_types: bool = False
    """Whether the model's graph takes TOKEN_TYPES."""
    late: LateSpec | None = None
    """How a late-interaction model reads its texts; None for every other kind."""
    template: tuple[str, ...] = ()
    """Texts before, between and behind the two texts of a pair that are tokenized as one text, of a
    decoder that answers a chat. Empty: the tokenizer joins a pair."""
    last_ids: tuple[int, ...] = ()
    """The tokens that end every text with a `template`, also one that is truncated."""
    routes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Input type → the tower that embeds texts of it, of a model with a tower for queries and one
    for documents. Other input types, and texts without one, go where the empty name goes."""

    @property
    def takes_texts(self) -> bool:
        """Whether an input may be a text. An encoder of images alone takes none."""
        return self.max_tokens > 0

    @property
    def takes_pairs(self) -> bool:
        """Whether an input may be, or is, a pair of texts."""
        return self.kind in (RERANKER, CLASSIFIER)

    def prompt(self, input_type: str | None) -> str:
        """The text to prepend to an input of this type.

        Raises:
            UnknownInputType: the model has no prompt for this input type.
        """
        name = input_type or self.default_input_type
        if name is None:
            return ""
        try:
            return self.prompts[name]
        except KeyError:
            known = ", ".join(sorted(self.prompts))
            # The message must not repeat `input_type`: it could be a user's text.
            raise UnknownInputType(
                f"the input type given is not one of {self.name}'s: {known}. Omit it for none."
            ) from None

    def is_query(self, input_type: str | None) -> bool:
        """Whether a late-interaction model reads an input of this type as a query. It reads every
        other as a document.
        """
        return (input_type or self.default_input_type) == QUERY

    def tower(self, input_type: str | None) -> str:
        """The tower that embeds texts of this type, of a model with `routes`.

        Raises:
            UnknownInputType: the model has no such input type, or needs one.
        """
        self.prompt(input_type)
        tower = self.routes.get(input_type or "") or self.routes.get("")
        if tower is None:
            known = ", ".join(sorted(self.routes))
            raise UnknownInputType(
                f"{self.name} embeds a text by its input type; give one of {known}."
            )
        return tower

    def images(self) -> ImageSpec:
        """The preprocessing of the model's images.

        Raises:
            InvalidModel: the model takes texts alone.
        """
        if self.image is None:
            raise InvalidModel(f"{self.name} takes no images.")
        return self.image

    def to_json(self) -> str:
        """The content of `spec.json`: indented, keys in the order of the fields."""
        fields = dataclasses.asdict(self)
        for name in ("image", "late"):
            if fields[name] is None:
                del fields[name]
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def load(folder: Path) -> ModelSpec:
    """Read `spec.json` from a version folder of the repository.

    Raises:
        InvalidModel: the file is missing, is not JSON, or is no spec.
    """
    try:
        fields: dict[str, Any] = dict(json.loads((folder / FILE_NAME).read_text("utf-8")))
        for name in (
            "length_buckets",
            "special_ids",
            "matryoshka",
            "labels",
            "template",
            "last_ids",
        ):
            fields[name] = tuple(fields.get(name, ()))
        if "image" in fields:
            fields["image"] = _image(fields["image"])
        if "late" in fields:
            skipped = tuple(fields["late"]["skipped_ids"])
            fields["late"] = LateSpec(**fields["late"] | {"skipped_ids": skipped})
        return ModelSpec(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidModel(
            f"{FILE_NAME} cannot be read ({type(error).__name__}); build the model again"
        ) from error


def _image(fields: dict[str, Any]) -> ImageSpec:
    lists = {name: tuple(fields[name]) for name in ("resize", "mean", "std")}
    return ImageSpec(**fields | lists)
