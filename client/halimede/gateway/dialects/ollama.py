"""Ollama's dialect."""

from __future__ import annotations

import hashlib
import time
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import AliasChoices, Field, PositiveInt

from halimede.gateway.calls import Asked, answer
from halimede.gateway.dialects.dialect import Body, Dialect, reads, register, takes
from halimede.gateway.errors import Problem
from halimede.results import ServedModel

VERSION = "0.11.11"
"""The version of Ollama whose API this is: the first with `dimensions`. Programs compare it."""
TAG = ":latest"
"""Ollama's own end of a name without a tag."""
MODIFIED = "1970-01-01T00:00:00Z"
"""When a model was made: it is not known."""

routes = APIRouter()


class OllamaEmbedRequest(Body):
    """Body of `POST /api/embed`. `options` and `keep_alive` change nothing here."""

    model: str = Field(examples=["all-MiniLM-L6-v2"])
    """A trailing `:latest` is left out."""
    input: str | list[str] = ""
    """A text or texts. An empty one alone has no vector, as with Ollama."""
    truncate: bool = True
    """Cut off texts beyond the token limit. Otherwise they are refused."""
    dimensions: PositiveInt | None = None
    """Leading components to keep."""


class OllamaEmbeddingsRequest(Body):
    """Body of `POST /api/embeddings`, which Ollama had before `/api/embed`."""

    model: str = Field(examples=["all-MiniLM-L6-v2"])
    prompt: str = ""


class OllamaShowRequest(Body):
    """Body of `POST /api/show`."""

    model: str = Field(validation_alias=AliasChoices("model", "name"))


@routes.post("/api/embed", summary="Embed texts", openapi_extra=takes(OllamaEmbedRequest))
async def embed(
    call: Asked, body: Annotated[OllamaEmbedRequest, reads(OllamaEmbedRequest)]
) -> Response:
    """Return one vector for each text. Durations are in nanoseconds."""
    start_ns = time.perf_counter_ns()
    model = await call.model(plain(body.model))
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors: Any = []
    if texts and body.input:
        result = await call.embed(
            model,
            texts,
            dimensions=body.dimensions,
            truncate="END" if body.truncate else "NONE",
        )
        vectors = list(result.vectors)
    else:
        await model.facts()
    return answer(
        call,
        {
            "model": body.model,
            "embeddings": vectors,
            "total_duration": time.perf_counter_ns() - start_ns,
            "load_duration": 0,
            "prompt_eval_count": call.tokens,
        },
    )


@routes.post(
    "/api/embeddings", summary="Embed a text", openapi_extra=takes(OllamaEmbeddingsRequest)
)
async def embeddings(
    call: Asked, body: Annotated[OllamaEmbeddingsRequest, reads(OllamaEmbeddingsRequest)]
) -> Response:
    """Return the vector of one text."""
    model = await call.model(plain(body.model))
    if not body.prompt:
        await model.facts()
        return answer(call, {"embedding": []})
    result = await call.embed(model, [body.prompt])
    return answer(call, {"embedding": result.vectors[0]})


@routes.get("/api/tags", summary="List models")
async def tags(call: Asked) -> Response:
    """Return the models that are served."""
    served = await call.served.all()
    return answer(call, {"models": [row(m.name, await m.facts()) for m in served]})


@routes.post("/api/show", summary="Describe a model", openapi_extra=takes(OllamaShowRequest))
async def show(
    call: Asked, body: Annotated[OllamaShowRequest, reads(OllamaShowRequest)]
) -> Response:
    """Return one model."""
    model = await call.model(plain(body.model))
    facts = await model.facts()
    return answer(
        call,
        {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "modified_at": MODIFIED,
            "details": details(facts),
            "model_info": {
                "general.architecture": "halimede",
                "general.basename": model.name,
                "halimede.embedding_length": facts.dims,
                "halimede.context_length": facts.max_tokens,
                "halimede.space": facts.space,
                "halimede.precision": facts.precision,
            },
            "capabilities": ["embedding"] if "vector" in facts.outputs else [],
        },
    )


@routes.get("/api/version", summary="Version of Ollama's API")
async def version(call: Asked) -> Response:
    """Return the version of Ollama whose API this is."""
    return answer(call, {"version": VERSION})


def plain(name: str) -> str:
    """Return a name without `:latest`."""
    return name.removesuffix(TAG)


def row(name: str, facts: ServedModel) -> dict[str, Any]:
    """Return a model as an entry of the list. Its digest is that of its space and precision."""
    return {
        "name": name + TAG,
        "model": name + TAG,
        "modified_at": MODIFIED,
        "size": 0,
        "digest": hashlib.sha256(f"{facts.space}\0{facts.precision}".encode()).hexdigest(),
        "details": details(facts),
    }


def details(facts: ServedModel) -> dict[str, Any]:
    """Return what Ollama says of the format of a model."""
    return {
        "parent_model": "",
        "format": "onnx",
        "family": facts.kind,
        "families": [facts.kind],
        "parameter_size": "",
        "quantization_level": facts.precision.upper(),
    }


def error(problem: Problem) -> tuple[int, Any]:
    """Return a problem as Ollama does."""
    return problem.status, {"error": problem.message}


DIALECT = register(Dialect("ollama", routes, error))
