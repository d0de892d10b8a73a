"""Cohere's dialect, v1 and v2, and Jina's rerank, which has the same path as Cohere's v1."""

from __future__ import annotations

import base64
import binascii
import math
import uuid
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, PositiveInt, model_validator

from halimede.gateway.calls import Asked, Call, Truncate, answer, cut_off
from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import Body, Dialect, reads, register, takes
from halimede.gateway.errors import Problem
from halimede.gateway.models import kinds
from halimede.gateway.models.served import Model, given
from halimede.results import ImageInfo
from halimede_ops.quantise import quantise

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]

routes = APIRouter()


class ImageUrl(Body):
    """Where an image is."""

    url: str = Field(max_length=1 << 25)
    """A data URI."""


class Part(Body):
    """A part of an input."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_its_own(self) -> Part:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type}")
        return self


class EmbedInput(Body):
    """A text, an image, or both, that are embedded as one vector."""

    content: list[Part] = Field(min_length=1)


class EmbedRequest(Body):
    """Body of `POST /v2/embed` and `POST /v1/embed`: texts, images or inputs."""

    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    """Default: the gateway's default model."""
    texts: list[str] | None = Field(None, examples=[["hello world"]], min_length=1)
    images: list[str] | None = Field(None, min_length=1)
    """Data URIs, such as `data:image/png;base64,…`."""
    inputs: list[EmbedInput] | None = Field(None, min_length=1)
    input_type: str | None = None
    """`search_query` and `search_document` have the model's prompts; other types have none."""
    embedding_types: tuple[EmbeddingType, ...] = ()
    """Default: float."""
    output_dimension: PositiveInt | None = None
    """Leading components to keep."""
    max_tokens: PositiveInt | None = None
    """Refuse texts of more tokens than this. Texts are cut off at the model's own limit alone."""
    truncate: Truncate = "END"
    """What is done with a text beyond the model's token limit."""

    @model_validator(mode="after")
    def _has_one(self) -> EmbedRequest:
        if sum(part is not None for part in (self.texts, self.images, self.inputs)) != 1:
            raise ValueError("give one of texts, images and inputs")
        return self


class RerankRequest(Body):
    """Body of `POST /v2/rerank` and `POST /v1/rerank`, of Cohere and of Jina.

    `max_tokens_per_doc` and `max_chunks_per_doc` change nothing: a document is read up to the
    model's token limit, and the answer's warnings say if one was cut off.
    """

    model: str | None = None
    """Default: the default model if it is a reranker, else the only reranker."""
    query: str = Field(examples=["Which bird swims?"])
    documents: list[str | dict[str, str]] = Field(min_length=1, examples=[["Penguins swim."]])
    """Texts, or objects of texts with `text` or the fields of `rank_fields`."""
    top_n: PositiveInt | None = None
    """Documents to return. Default: all."""
    return_documents: bool | None = None
    """Default: true in v1, as Jina's, and false in v2."""
    rank_fields: list[str] = Field(["text"], min_length=1)
    """Fields of each document that are ranked, in this order."""


class Version(BaseModel):
    """Version of the API."""

    version: str


class Meta(BaseModel):
    """What an answer says besides."""

    api_version: Version
    billed_units: dict[str, int]
    warnings: list[str] = []


class EmbedResponse(BaseModel):
    """Answer of `/v2/embed`, and of `/v1/embed` with types. Without, `embeddings` is a list."""

    id: str
    embeddings: dict[EmbeddingType, list[Any]] | list[list[float]]
    texts: list[str]
    meta: Meta
    response_type: Literal["embeddings_by_type", "embeddings_floats"]


class RerankResult(BaseModel):
    """A document in a ranking."""

    index: int
    relevance_score: float
    """In 0 … 1."""
    document: dict[str, str] | None = None


class RerankResponse(BaseModel):
    """Answer of a rerank: Cohere's fields and Jina's."""

    id: str
    results: list[RerankResult]
    meta: Meta
    model: str
    usage: dict[str, int]


class Embedded(NamedTuple):
    """What was embedded."""

    vectors: np.ndarray
    """`[inputs, dims]` float32."""
    texts: list[str]
    images: tuple[ImageInfo, ...]


@routes.post(
    "/v2/embed",
    summary="Embed texts and images",
    openapi_extra=takes(EmbedRequest),
    responses={200: {"model": EmbedResponse}},
)
async def embed_v2(call: Asked, body: Annotated[EmbedRequest, reads(EmbedRequest)]) -> Response:
    """Return one vector for each input, in each type."""
    return await _embed(call, body, "2")


@routes.post(
    "/v1/embed",
    summary="Embed texts and images",
    openapi_extra=takes(EmbedRequest),
    responses={200: {"model": EmbedResponse}},
)
async def embed_v1(call: Asked, body: Annotated[EmbedRequest, reads(EmbedRequest)]) -> Response:
    """Return one vector for each input; without `embedding_types` in a plain list."""
    return await _embed(call, body, "1")


async def _embed(call: Call, body: EmbedRequest, version: str) -> Response:
    embedded = await embedded_of(call, await call.model(body.model), body)
    is_plain = version == "1" and not body.embedding_types
    types = body.embedding_types or ("float",)
    by_type = {name: typed(embedded.vectors, name, call.config.int8_range) for name in types}
    found: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "embeddings": by_type["float"] if is_plain else by_type,
        "texts": embedded.texts,
        "response_type": "embeddings_floats" if is_plain else "embeddings_by_type",
    }
    units = {"input_tokens": call.tokens}
    if embedded.images:
        units["images"] = len(embedded.images)
        found["images"] = [
            {"width": info.width, "height": info.height, "format": info.format.lower()}
            for info in embedded.images
        ]
    return answer(call, {**found, "meta": meta(call, version, units)})


async def embedded_of(call: Call, model: Model, body: EmbedRequest) -> Embedded:
    """Embed the inputs of a body.

    Raises:
        Problem: an image is no data URI, an input has several texts or images, or a text has more
            than `max_tokens` tokens.
    """
    kind = openai.input_type(body.input_type)
    if body.texts is not None:
        pairs: list[tuple[str | None, bytes | None]] = [(text, None) for text in body.texts]
    elif body.images is not None:
        pairs = [(None, image_of(url, index)) for index, url in enumerate(body.images)]
    else:
        pairs = [pair_of(one, index) for index, one in enumerate(body.inputs or ())]
    texts = [text for text, _ in pairs if text is not None]
    files = [file for _, file in pairs if file is not None]
    if len(texts) + len(files) == len(pairs):
        vectors, images = await _embed_apart(call, model, body, kind, texts, files)
        # Texts come first in the rows; `order` is where each input is.
        is_image = np.array([file is not None for _, file in pairs])
        order = np.argsort(np.argsort(is_image, kind="stable"))
        embedded = Embedded(vectors[order], texts, images)
    else:  # a text with its image has one vector
        options = given(dimensions=body.output_dimension, input_type=kind)

        async def embed_pairs(asked: Any) -> Any:
            return await model.client.embed_multimodal(
                [text for text, _ in asked], [file for _, file in asked], **options
            )

        both = await call.ask(embed_pairs, pairs, truncate=body.truncate)
        images = tuple(info for info in both.images if info.format)
        embedded = Embedded(both.vectors, texts, images)
    check_tokens(call, body.max_tokens)
    return embedded


async def _embed_apart(
    call: Call,
    model: Model,
    body: EmbedRequest,
    kind: str | None,
    texts: list[str],
    files: list[bytes],
) -> tuple[np.ndarray, tuple[ImageInfo, ...]]:
    """Embed texts and images: the texts' vectors, then the images'."""
    rows: list[np.ndarray] = []
    images: tuple[ImageInfo, ...] = ()
    dims = body.output_dimension
    if texts:
        result = await call.embed(
            model, texts, input_type=kind, dimensions=dims, truncate=body.truncate
        )
        rows.append(result.vectors)
    if files:
        seen = await call.embed_images(model, files, dims)
        rows.append(seen.vectors)
        images = seen.images
    if len({result.space for result in call.results}) > 1:
        raise Problem(409, "the texts and the images were embedded into two spaces.")
    return np.concatenate(rows), images


def pair_of(one: EmbedInput, index: int) -> tuple[str | None, bytes | None]:
    """Return the text and the image of an input."""
    texts = [part.text for part in one.content if part.text is not None]
    urls = [part.image_url.url for part in one.content if part.image_url is not None]
    if len(texts) > 1 or len(urls) > 1:
        raise Problem(
            400,
            f"input {index} has {len(texts)} texts and {len(urls)} images; give at most one of "
            "each.",
            param="inputs",
        )
    return (texts[0] if texts else None, image_of(urls[0], index) if urls else None)


def image_of(uri: str, index: int) -> bytes:
    """Return the file of a data URI.

    Raises:
        Problem: it is none. Other addresses are not fetched.
    """
    head, comma, data = uri.partition(",")
    try:
        if comma and head.startswith("data:") and head.endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except binascii.Error:
        pass
    raise Problem(
        400, f"image {index} is no data URI. Give data:image/png;base64,… of the file.",
        param="images",
    )  # fmt: skip


def check_tokens(call: Call, max_tokens: int | None) -> None:
    """Raise if a text has more tokens than a caller wants to be read.

    Raises:
        Problem: one has, and the model's limit is larger.
    """
    for result in call.results:
        read = np.minimum(result.tokens, result.max_tokens)
        over = np.flatnonzero(read > (max_tokens or result.max_tokens))
        if len(over):
            raise Problem(
                400,
                f"text {int(over[0])} has {int(result.tokens[over[0]]):,} tokens, and max_tokens "
                f"is {max_tokens}. {result.model} cuts texts off at {result.max_tokens:,} alone: "
                "shorten the text, or leave out max_tokens.",
                "input_too_long",
                param="max_tokens",
            )


def typed(vectors: np.ndarray, name: EmbeddingType, int8_range: float | None) -> Any:
    """Return vectors `[inputs, dims]` float32 in a type, as JSON or array.

    int8 and uint8 have one range for all components and all texts, so vectors of two requests can
    be compared.
    """
    if name not in ("int8", "uint8"):
        return openai.typed(vectors, name)
    dims = vectors.shape[1]
    highest = np.full(dims, int8_range or 4 / math.sqrt(dims), np.float32)
    return quantise(vectors, name, np.stack([-highest, highest]))


def meta(call: Call, version: str, units: dict[str, int]) -> dict[str, Any]:
    """Return the version of the API, what would be billed, and how many texts were cut off."""
    found: dict[str, Any] = {"api_version": {"version": version}, "billed_units": units}
    result = call.results[0]
    count = sum(len(cut_off(each)) for each in call.results)
    if count:
        what = "1 text was" if count == 1 else f"{count:,} texts were"
        found["warnings"] = [
            f"{what} cut off: {result.model} reads {result.max_tokens:,} tokens of a text."
        ]
    return found


@routes.post(
    "/v2/rerank",
    summary="Rank documents",
    openapi_extra=takes(RerankRequest),
    responses={200: {"model": RerankResponse}},
)
async def rerank_v2(call: Asked, body: Annotated[RerankRequest, reads(RerankRequest)]) -> Response:
    """Return documents by their relevance to a query, the best first."""
    return await _rerank(call, body, "2", bool(body.return_documents))


@routes.post(
    "/v1/rerank",
    summary="Rank documents",
    openapi_extra=takes(RerankRequest),
    responses={200: {"model": RerankResponse}},
)
async def rerank_v1(call: Asked, body: Annotated[RerankRequest, reads(RerankRequest)]) -> Response:
    """Return documents by their relevance to a query, the best first: Cohere's v1 and Jina's."""
    return await _rerank(call, body, "1", body.return_documents is not False)


async def _rerank(
    call: Call, body: RerankRequest, version: str, return_documents: bool
) -> Response:
    documents = [
        text_of(document, index, body.rank_fields) for index, document in enumerate(body.documents)
    ]
    model = await kinds.model_of(call, body.model, kinds.RERANKER)
    ranking = await call.rank(model, body.query, documents, body.top_n)
    scores = await kinds.probabilities(model, ranking)
    results: list[dict[str, Any]] = [
        {"index": int(index), "relevance_score": score}
        for index, score in zip(ranking.indices, scores.tolist(), strict=True)
    ]
    if return_documents:
        for row in results:
            document = body.documents[row["index"]]
            row["document"] = {"text": document} if isinstance(document, str) else document
    return answer(
        call,
        {
            "id": str(uuid.uuid4()),
            "results": results,
            "meta": meta(call, version, {"search_units": 1}),
            "model": body.model or model.name,
            "usage": {"prompt_tokens": call.tokens, "total_tokens": call.tokens},
        },
    )


def text_of(document: str | dict[str, str], index: int, fields: list[str]) -> str:
    """Return the text of a document, by the fields that are ranked.

    Raises:
        Problem: it has none of them.
    """
    if isinstance(document, str):
        return document
    values = [document[name] for name in fields if name in document]
    if not values:
        raise Problem(
            400,
            f"document {index} has no text. Give text in each, or name its fields in rank_fields.",
            param="documents",
        )
    return "\n".join(values)


def error(problem: Problem) -> tuple[int, Any]:
    """Return a problem as Cohere does, and as Jina does."""
    return problem.status, {"message": problem.message, "detail": problem.message}


DIALECT = register(Dialect("cohere", routes, error))
