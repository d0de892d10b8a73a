"""The dialect of Text Embeddings Inference (TEI), and of Hugging Face's InferenceClient.

TEI serves one model. Here each request may name one, in the field `model` or in the header
`halimede-model`; otherwise it asks the default model, or the only one of the path's kind.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from halimede.gateway.calls import Asked, Truncate, answer
from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import B, Body, Dialect, reads, register, takes
from halimede.gateway.dialects.health import check_ready
from halimede.gateway.errors import Problem
from halimede.gateway.models import kinds, tokenizers
from halimede.gateway.models.served import Model
from halimede.results import Classification, ServedModel
from halimede_ops.quantise import similarity as cosines

MAX_TOKENIZED = 262_144
"""Maximum characters of a `/tokenize`, and ids of a `/decode`: an answer is 60 times as large."""
MAX_NUMBERS = 8_388_608
"""Maximum numbers in the answer of an `/embed_all` or `/embed_sparse`: 170 MB of JSON."""
HEALTHY_S = 5.0
"""Seconds in which the default model must describe itself."""
DTYPES = {"fp32": "float32", "fp16": "float16"}
"""Precision → TEI's word for it."""

routes = APIRouter()


async def _model_header(request: Request) -> str | None:
    return request.headers.get("halimede-model")


Named = Annotated[str | None, Depends(_model_header)]
"""Parameter of an endpoint: the model that a header names."""


class ErrorResponse(BaseModel):
    """Body of an answer to a request that is refused."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer"]


class OfModel(Body):
    """A body that may name a model."""

    model: str | None = None


class Truncation(Body):
    """What is done with a text beyond the token limit."""

    truncate: bool = False
    """Cut it off. Otherwise it is refused."""
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    """Where it is cut off. Models that cut texts at their end refuse `Left`."""

    @property
    def rule(self) -> Truncate:
        """As a value of calls."""
        if not self.truncate:
            return "NONE"
        return "START" if self.truncation_direction.lower() == "left" else "END"


class TextsRequest(OfModel, Truncation):
    """Body of `POST /embed_all` and `POST /embed_sparse`."""

    inputs: str | list[str] = Field(examples=["What is Deep Learning?"])
    prompt_name: str | None = None
    """Name of the model's prompt that is prepended."""

    @property
    def texts(self) -> list[str]:
        """The texts.

        Raises:
            Problem: there is none.
        """
        return _some([self.inputs] if isinstance(self.inputs, str) else self.inputs, "inputs")


class EmbedRequest(TextsRequest):
    """Body of `POST /embed`."""

    normalize: bool = True
    dimensions: PositiveInt | None = None
    """Leading components to keep."""


class RerankRequest(OfModel, Truncation):
    """Body of `POST /rerank`."""

    query: str = Field(examples=["What is Deep Learning?"])
    texts: list[str] = Field(examples=[["Deep Learning is ..."]])
    raw_scores: bool = False
    """Logits, instead of scores in 0 … 1."""
    return_text: bool = False


class PredictParameters(Body):
    """What the InferenceClient sends besides."""

    top_k: PositiveInt | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None


class PredictRequest(OfModel, Truncation):
    """Body of `POST /predict`."""

    inputs: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2)]
        | list[Annotated[list[str], Field(min_length=1, max_length=2)]]
    ) = Field(examples=["I like you."])
    """A text; a pair of texts; or a batch, with one or two texts each."""
    raw_scores: bool = False
    """Logits, instead of probabilities."""
    parameters: PredictParameters | None = None
    """Sent by the InferenceClient. The answer to one text then is a list in a list."""


class SimilarityInput(Body):
    """A text, and those to compare it with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(Truncation):
    """Options of `POST /similarity`."""

    prompt_name: str | None = None
    """Name of the model's prompt that is prepended."""


class SimilarityRequest(OfModel):
    """Body of `POST /similarity`."""

    inputs: SimilarityInput = Field(
        examples=[{"source_sentence": "It rains.", "sentences": ["It pours."]}]
    )
    parameters: SimilarityParameters = SimilarityParameters()


class TokenizeRequest(OfModel):
    """Body of `POST /tokenize`."""

    inputs: str | list[str] = Field(examples=["hello world"])
    add_special_tokens: bool = True
    prompt_name: str | None = None
    """Name of the model's prompt that is prepended."""


class DecodeRequest(OfModel):
    """Body of `POST /decode`."""

    ids: list[NonNegativeInt] | list[list[NonNegativeInt]] = Field(examples=[[101, 7592, 102]])
    skip_special_tokens: bool = True


class AnyRequest(OfModel):
    """Body of `POST /`: that of the path for the model's kind."""

    inputs: Any = Field(None, examples=["What is Deep Learning?"])
    query: Any = None


class SparseValue(BaseModel):
    """The weight of a token."""

    index: int
    value: float


class Rank(BaseModel):
    """A text in a ranking."""

    index: int
    score: float
    text: str | None = None


class Prediction(BaseModel):
    """A label's score."""

    label: str
    score: float


class SimpleToken(BaseModel):
    """A token of a text."""

    id: int
    text: str
    special: bool
    start: int | None
    """First byte in the text, prompt included. None for a special token."""
    stop: int | None


class Info(BaseModel):
    """A model, and the limits of the gateway."""

    model_id: str
    served_model_name: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


def _returns(kind: Any) -> dict[int | str, dict[str, Any]]:
    refused = ("400", "401", "403", "404", "413", "422", "424", "429", "503")
    return {200: {"model": kind}, **{status: {"model": ErrorResponse} for status in refused}}


@routes.post("/", summary="Ask a model what it is for", openapi_extra=takes(AnyRequest))
async def root(call: Asked, request: Request) -> Response:
    """Answer as the path for the model's kind: `/embed`, `/embed_sparse`, `/predict`, `/rerank`, or
    `/similarity` for sentences to compare.
    """
    asked = await _body(AnyRequest, request)
    named = await _model_header(request)
    if asked.query is not None:
        return await rerank(call, named, await _body(RerankRequest, request))
    if isinstance(asked.inputs, Mapping):
        return await similarity(call, named, await _body(SimilarityRequest, request))
    facts = await (await call.model(asked.model or named)).facts()
    if kinds.CLASSIFIER.has(facts):
        return await predict(call, named, await _body(PredictRequest, request))
    if facts.kind == "sparse":
        return await embed_sparse(call, named, await _body(TextsRequest, request))
    if kinds.RERANKER.has(facts):
        return await rerank(call, named, await _body(RerankRequest, request))
    return await embed(call, named, await _body(EmbedRequest, request))


async def _body(kind: type[B], request: Request) -> B:
    body: B = await reads(kind).dependency(request)
    return body


@routes.post(
    "/embed",
    summary="Embed texts",
    openapi_extra=takes(EmbedRequest),
    responses=_returns(list[list[float]]),
)
async def embed(
    call: Asked, named: Named, body: Annotated[EmbedRequest, reads(EmbedRequest)]
) -> Response:
    """Return one vector for each text, also for a single one."""
    texts = body.texts
    model = await kinds.model_of(call, body.model or named, kinds.EMBEDDER, 424)
    result = await call.embed(
        model,
        texts,
        input_type=body.prompt_name,
        dimensions=body.dimensions,
        truncate=body.rule,
    )
    vectors = openai.scaled(result.vectors, body.normalize, model)
    return answer(call, openai.typed(vectors, "float"))


@routes.post(
    "/embed_all",
    summary="Embed each token of texts",
    openapi_extra=takes(TextsRequest),
    responses=_returns(list[list[list[float]]]),
)
async def embed_all(
    call: Asked, named: Named, body: Annotated[TextsRequest, reads(TextsRequest)]
) -> Response:
    """Return a vector for each token of each text, as late-interaction models give them."""
    texts = body.texts
    model = await kinds.model_of(call, body.model or named, kinds.MULTI, 424)
    result = await call.ask(model.embed_multi, texts, body.prompt_name, truncate=body.rule)
    _check_numbers(result.vectors)
    return answer(call, [np.ascontiguousarray(rows) for rows in result.vectors])


@routes.post(
    "/embed_sparse",
    summary="Embed texts as weights of tokens",
    openapi_extra=takes(TextsRequest),
    responses=_returns(list[list[SparseValue]]),
)
async def embed_sparse(
    call: Asked, named: Named, body: Annotated[TextsRequest, reads(TextsRequest)]
) -> Response:
    """Return the weights of tokens of each text."""
    texts = body.texts
    model = await kinds.model_of(call, body.model or named, kinds.SPARSE, 424)
    result = await call.ask(model.embed_sparse, texts, body.prompt_name, truncate=body.rule)
    _check_numbers(result.ids)
    return answer(
        call,
        [sparse_row(*pair) for pair in zip(result.ids, result.weights, strict=True)],
    )


def sparse_row(ids: np.ndarray, weights: np.ndarray) -> Any:
    """Return ids and weights `[n]` of one text as JSON."""
    import orjson

    pairs = zip(ids.tolist(), weights.tolist(), strict=True)
    # As text it takes a tenth of the memory of its objects.
    return orjson.Fragment(orjson.dumps([{"index": id_, "value": value} for id_, value in pairs]))


@routes.post(
    "/rerank",
    summary="Rank texts",
    openapi_extra=takes(RerankRequest),
    responses=_returns(list[Rank]),
)
async def rerank(
    call: Asked, named: Named, body: Annotated[RerankRequest, reads(RerankRequest)]
) -> Response:
    """Return texts by their relevance to a query, the best first."""
    texts = _some(body.texts, "texts")
    model = await kinds.model_of(call, body.model or named, kinds.RERANKER, 424)
    ranking = await call.rank(model, body.query, texts, truncate=body.rule)
    scores = await (kinds.logits if body.raw_scores else kinds.probabilities)(model, ranking)
    rows: list[dict[str, Any]] = [
        {"index": index, "score": score}
        for index, score in zip(ranking.indices.tolist(), scores.tolist(), strict=True)
    ]
    if body.return_text:
        rows = [{**row, "text": texts[row["index"]]} for row in rows]
    return answer(call, rows)


@routes.post(
    "/predict",
    summary="Classify texts",
    openapi_extra=takes(PredictRequest),
    responses=_returns(list[Prediction] | list[list[Prediction]]),
)
async def predict(
    call: Asked, named: Named, body: Annotated[PredictRequest, reads(PredictRequest)]
) -> Response:
    """Return each label's score, the highest first; for a batch a list of these for each text."""
    is_batch, rows = _classified(body.inputs)
    model = await kinds.model_of(call, body.model or named, kinds.CLASSIFIER, 424)
    extra = body.parameters or PredictParameters()
    raw = body.raw_scores or extra.function_to_apply == "none"
    found: list[Any] = [None] * len(rows)
    for size in {len(row) for row in rows}:
        places = [place for place, row in enumerate(rows) if len(row) == size]
        columns = [list(column) for column in zip(*(rows[p] for p in places), strict=True)]
        result = await call.ask(model.classify, *columns, truncate=body.rule)
        scores = await _scores(model, result, raw, extra)
        for place, row in zip(places, scores, strict=True):
            best = np.argsort(-row, kind="stable")[: extra.top_k]
            found[place] = [{"label": result.labels[k], "score": float(row[k])} for k in best]
    nested = is_batch or body.parameters is not None
    return answer(call, found if nested else found[0])


def _classified(inputs: Any) -> tuple[bool, list[list[str]]]:
    """Return whether inputs are a batch, and the one or two texts of each."""
    if isinstance(inputs, str):
        return False, [[inputs]]
    if inputs and isinstance(inputs[0], str):
        return False, [inputs]
    return True, _some(inputs, "inputs")


async def _scores(
    model: Model, result: Classification, raw: bool, extra: PredictParameters
) -> np.ndarray:
    """Return the scores of labels as they are asked for.

    Raises:
        Problem: that is not what the model gives.
    """
    is_probable = await kinds.are_probabilities(model, result)
    function = extra.function_to_apply
    if is_probable and (raw or function not in (None, "none")):
        raise Problem(
            422,
            f"the scores of {model.name} are probabilities already; its logits are not served. "
            "Leave out raw_scores and function_to_apply.",
        )
    if raw:
        return result.scores
    if function == "sigmoid":
        return kinds.sigmoid(result.scores)
    return await kinds.probabilities(model, result)


@routes.post(
    "/similarity",
    summary="Compare a text with others",
    openapi_extra=takes(SimilarityRequest),
    responses=_returns(list[float]),
)
async def similarity(
    call: Asked, named: Named, body: Annotated[SimilarityRequest, reads(SimilarityRequest)]
) -> Response:
    """Return the cosine of each sentence to the source sentence."""
    sentences = _some(body.inputs.sentences, "inputs.sentences")
    model = await kinds.model_of(call, body.model or named, kinds.EMBEDDER, 424)
    result = await call.embed(
        model,
        [body.inputs.source_sentence, *sentences],
        input_type=body.parameters.prompt_name,
        truncate=body.parameters.rule,
    )
    return answer(call, cosines(result.vectors[:1], result.vectors[1:], "float32")[0])


@routes.post(
    "/tokenize",
    summary="Tokenize texts",
    openapi_extra=takes(TokenizeRequest),
    responses=_returns(list[list[SimpleToken]]),
)
async def tokenize(
    call: Asked, named: Named, body: Annotated[TokenizeRequest, reads(TokenizeRequest)]
) -> Response:
    """Return the tokens of each text. Nothing is cut off."""
    texts = _some([body.inputs] if isinstance(body.inputs, str) else body.inputs, "inputs")
    await call.admit(len(texts))
    _check_size(sum(map(len, texts)), "characters")
    own = await tokenizers.tokenizer_of(await call.model(body.model or named))
    prompt = own.spec.prompt(body.prompt_name)
    prompted = [prompt + text for text in texts]
    encodings = await asyncio.to_thread(
        own.tokenizer.encode_batch, prompted, add_special_tokens=body.add_special_tokens
    )
    return answer(call, [tokens(*pair) for pair in zip(prompted, encodings, strict=True)])


def tokens(text: str, encoding: Any) -> list[dict[str, Any]]:
    """Return the tokens of a text, with their places in its UTF-8."""
    sizes = (len(letter.encode()) for letter in text)
    places = [0, *itertools.accumulate(sizes)]
    return [
        {"id": id_, "text": token, "special": True, "start": None, "stop": None}
        if special
        else {
            "id": id_,
            "text": text[start:stop],
            "special": False,
            "start": places[start],
            "stop": places[stop],
        }
        for id_, token, special, (start, stop) in zip(
            encoding.ids,
            encoding.tokens,
            encoding.special_tokens_mask,
            encoding.offsets,
            strict=True,
        )
    ]


@routes.post(
    "/decode",
    summary="Texts of token ids",
    openapi_extra=takes(DecodeRequest),
    responses=_returns(list[str]),
)
async def decode(
    call: Asked, named: Named, body: Annotated[DecodeRequest, reads(DecodeRequest)]
) -> Response:
    """Return the text of each list of ids, also of a single one."""
    ids: Any = _some(body.ids, "ids")
    batch: list[list[int]] = ids if isinstance(ids[0], list) else [ids]
    await call.admit(len(batch))
    _check_size(sum(map(len, batch)), "ids")
    own = await tokenizers.tokenizer_of(await call.model(body.model or named))
    if not all(_has(own.tokenizer, id_) for id_ in {id_ for row in batch for id_ in row}):
        raise Problem(422, "ids has some that the model's tokenizer has not.", "tokenizer")
    texts = await asyncio.to_thread(
        own.tokenizer.decode_batch, batch, skip_special_tokens=body.skip_special_tokens
    )
    return answer(call, texts)


@routes.get("/info", summary="Describe a model", responses=_returns(Info))
async def info(call: Asked, named: Named, model: str | None = None) -> Response:
    """Return a model, and the gateway's limits. `model_sha` is the model's space."""
    found = await call.model(model or named)
    facts = await found.facts()
    return answer(
        call,
        {
            "model_id": found.name,
            "served_model_name": found.name,
            "model_sha": facts.space,
            "model_dtype": DTYPES.get(facts.precision, facts.precision),
            "model_type": model_type(facts),
            "max_concurrent_requests": call.config.max_requests,
            "max_input_length": facts.max_tokens,
            "max_batch_tokens": facts.max_tokens * facts.max_batch_size,
            "max_batch_requests": facts.max_batch_size,
            "max_client_batch_size": call.config.max_inputs,
            "auto_truncate": False,
            "tokenization_workers": 0,
            "version": importlib.metadata.version("halimede"),
            "sha": None,
            "docker_label": None,
        },
    )


def model_type(facts: ServedModel) -> dict[str, Any]:
    """Return TEI's description of a model's kind. The pooling of a dense model is not known."""
    if facts.kind in ("reranker", "classifier"):
        labels = facts.labels or ("LABEL_0",)
        return {
            facts.kind: {
                "id2label": {str(index): label for index, label in enumerate(labels)},
                "label2id": {label: index for index, label in enumerate(labels)},
            }
        }
    return {"embedding": {"pooling": "splade" if facts.kind == "sparse" else "unknown"}}


@routes.get("/health", summary="Does the default model answer?", response_class=Response)
async def health(call: Asked) -> Response:
    """Return nothing if the default model describes itself, which is read every 10 s at most."""
    await check_ready(call.served, HEALTHY_S)
    return Response()


def _some(inputs: list[Any], name: str) -> list[Any]:
    if not inputs:
        raise Problem(422, f"{name} is empty; give one or more.", param=name)
    return inputs


def _has(tokenizer: Any, id_: int) -> bool:
    return id_ < 1 << 32 and tokenizer.id_to_token(id_) is not None


def _check_numbers(rows: Iterable[np.ndarray]) -> None:
    numbers = sum(row.size for row in rows)
    if numbers > MAX_NUMBERS:
        raise Problem(
            413,
            f"the answer has {numbers:,} numbers; it may have {MAX_NUMBERS:,}. Send fewer inputs.",
        )


def _check_size(size: int, what: str) -> None:
    if size > MAX_TOKENIZED:
        raise Problem(413, f"{size:,} {what} are given; {MAX_TOKENIZED:,} are taken at most.")


def error(problem: Problem) -> tuple[int, Any]:
    """Return a problem as TEI does."""
    status = 413 if problem.code == "input_too_long" else problem.status
    if status in (500, 501, 502):
        status = 424  # an error of the model, which no other try repairs
    words = {424: "Backend", 429: "Overloaded", 503: "Unhealthy", 504: "Backend"}
    usual = "Tokenizer" if problem.code == "tokenizer" else "Validation"
    return status, {"error": problem.message, "error_type": words.get(status, usual)}


DIALECT = register(Dialect("tei", routes, error))
