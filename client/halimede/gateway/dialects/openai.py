"""OpenAI's dialect: embeddings and models, with what NVIDIA's NIM adds to it."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Response
from pydantic import AliasChoices, Field, PositiveInt

from halimede.gateway.calls import UNIT, Asked, Call, Truncate, answer
from halimede.gateway.dialects.dialect import Body, Dialect, reads, register, takes
from halimede.gateway.errors import Problem
from halimede.gateway.models.served import Model
from halimede_ops.errors import ModelNotFound, SpaceRefused, UnsupportedInput
from halimede_ops.quantise import quantise
from halimede_ops.vectors import normalise

CREATED_S = 0
"""Unix time at which a model was made: it is not known."""

routes = APIRouter()


class EmbeddingsRequest(Body):
    """Body of `POST /v1/embeddings`."""

    input: str | list[str] | list[int] | list[list[int]] = Field(examples=["hello world"])
    """A text, texts, or the token ids of one or several texts."""
    model: str = Field(examples=["all-MiniLM-L6-v2"])
    encoding_format: Literal["float", "base64"] = "float"
    """base64: the vector's little-endian float32."""
    dimensions: PositiveInt | None = None
    """Leading components to keep."""
    user: str | None = None
    """Decides whether a candidate of the model answers: one version answers a user's requests."""
    input_type: str | None = None
    """NIM: `query` or `passage`."""
    truncate: Truncate | bool = "END"
    """NIM: what is done with a text beyond the token limit. Jina: whether it is cut off."""
    task: str | None = None
    """Jina: `retrieval.query` or `retrieval.passage`."""
    late_chunking: bool = False
    """Jina: the texts are parts of one, and each vector is made with all of it as context. The
    model must be built with `--late-chunking`."""
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = Field(
        None, validation_alias=AliasChoices("embedding_type", "encoding_type")
    )
    """Jina: binary and ubinary give a bit for each component, in bytes."""
    normalized: bool | None = None
    """Jina: whether vectors have length 1. Default: as the model gives them."""


@routes.post("/v1/embeddings", summary="Embed texts", openapi_extra=takes(EmbeddingsRequest))
async def embeddings(
    call: Asked, body: Annotated[EmbeddingsRequest, reads(EmbeddingsRequest)]
) -> Response:
    """Return one vector for each text, in the texts' order."""
    model = await call.model(body.model)
    texts, asked = texts_of(body.input, call), input_type(body.input_type or body.task)
    if body.late_chunking:
        try:
            result = await call.embed_parts(
                model, texts, input_type=asked, dimensions=body.dimensions
            )
        except UnsupportedInput as error:
            raise Problem(400, str(error), param="late_chunking") from None
        except (ModelNotFound, SpaceRefused) as error:
            raise Problem(501, str(error), param="late_chunking") from None
    else:
        truncate = body.truncate
        result = await call.embed(
            model,
            texts,
            input_type=asked,
            dimensions=body.dimensions,
            truncate=truncate if isinstance(truncate, str) else "END" if truncate else "NONE",
            user=body.user,
        )
    kind = body.embedding_type or body.encoding_format
    vectors = scaled(result.vectors, body.normalized, model)
    return answer(
        call,
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(typed(vectors, kind))
            ],
            "model": body.model or model.name,
            "usage": {"prompt_tokens": call.tokens, "total_tokens": call.tokens},
        },
    )


class UnnamedEmbeddingsRequest(EmbeddingsRequest):
    """Body of `POST /embeddings`."""

    model: str = ""
    """Default: the gateway's default model."""


@routes.post("/embeddings", summary="Embed texts", openapi_extra=takes(UnnamedEmbeddingsRequest))
async def unnamed_embeddings(
    call: Asked, body: Annotated[UnnamedEmbeddingsRequest, reads(UnnamedEmbeddingsRequest)]
) -> Response:
    """Return what `/v1/embeddings` does. This is TEI's path, on which no model is needed."""
    return await embeddings(call, body)


@routes.get("/v1/models", summary="List models")
async def models(call: Asked) -> Response:
    """Return the models that are served."""
    return answer(call, {"object": "list", "data": [row(m.name) for m in await call.served.all()]})


@routes.get("/v1/models/{name:path}", summary="Describe a model")
async def model(name: str, call: Asked) -> Response:
    """Return one model."""
    found = await call.model(name)
    await found.facts()
    return answer(call, row(name))


def row(name: str) -> dict[str, Any]:
    """Return a model as an entry of the list."""
    return {"id": name, "object": "model", "created": CREATED_S, "owned_by": "halimede"}


def typed(vectors: np.ndarray, kind: str) -> Any:
    """Return vectors `[texts, dims]` float32 in a type of OpenAI or Jina, as JSON or an array."""
    if kind == "float":
        return np.ascontiguousarray(vectors)
    if kind == "base64":
        return [encoded(vector) for vector in vectors]
    return quantise(vectors, "binary" if kind == "binary" else "ubinary")


def scaled(vectors: np.ndarray, to_unit: bool | None, model: Model) -> np.ndarray:
    """Return vectors `[texts, dims]`, of length 1 if that is wanted. None: as they are.

    Raises:
        Problem: others are wanted of a model whose vectors have length 1.
    """
    if to_unit is None:
        return vectors
    is_unit = bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT).all())
    if is_unit and not to_unit:
        raise Problem(
            422,
            f"the vectors of {model.name} have length 1; what they were before is not served. "
            "Leave out normalize (Jina: normalized), or pass true.",
        )
    return vectors if is_unit or not to_unit else normalise(vectors)


def encoded(vector: np.ndarray) -> str:
    """Return a vector `[dims]` as base64 of its little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def texts_of(given: Any, call: Call) -> list[str]:
    """Return the texts of an `input`.

    Raises:
        Problem: it is empty, or has token ids and the gateway is not to decode them.
    """
    if given == [] or given == "":
        raise Problem(400, "input is empty. Give a text, or a list of texts.", param="input")
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], str):
        return list(given)
    return decoded(given if isinstance(given[0], list) else [given], call.config.decode_tokens)


def decoded(ids: list[list[int]], encoding: str | None) -> list[str]:
    """Return the texts of token ids in an encoding of tiktoken.

    Raises:
        Problem: there is no encoding, or it has no such ids.
    """
    if encoding is None:
        raise Problem(
            400,
            "input has token ids of another tokenizer, such as cl100k_base. Send texts: with "
            "LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False. Or let the gateway "
            "decode them: gateway.decode_tokens.",
            param="input",
        )
    from halimede.extras import import_optional

    tokens = import_optional("tiktoken", "gateway-tokens").get_encoding(encoding)
    try:
        return [tokens.decode(text, errors="strict") for text in ids]
    except (KeyError, OverflowError, UnicodeDecodeError):
        raise Problem(
            400, f"input has ids that are no text in {encoding}.", param="input"
        ) from None


PROMPTS = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
}
"""Word of an API → the prompt of queries or of documents."""


def input_type(given: str | None) -> str | None:
    """Return the name of the model's prompt for an input type in the words of another API.

    Words that only say what the vectors are for, such as `classification`, mean no prompt.
    """
    return None if given is None else PROMPTS.get(given.rpartition(".")[2])


def error(problem: Problem) -> tuple[int, Any]:
    """Return a problem as OpenAI does."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    usual = "server_error" if problem.status >= 500 else "invalid_request_error"
    return problem.status, {
        "error": {
            "message": problem.message,
            "type": kinds.get(problem.status, usual),
            "param": problem.param,
            "code": problem.word,
        }
    }


DIALECT = register(Dialect("openai", routes, error))
