"""The dialect of the agent platform that halimede was written for."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from halimede.gateway.calls import Asked, answer
from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import Body, Dialect, reads, register, takes
from halimede.results import Embeddings

routes = APIRouter()


class GenerateRequest(Body):
    """Body of `POST /v1/embeddings/generate`."""

    text: str | list[str] = Field(examples=["hello world"])
    """A text, or texts."""
    model: str | None = None
    """Default: the gateway's default model."""
    use_fallback: bool = True
    """Let the configured fallbacks answer if the model cannot."""


class EncodeRequest(Body):
    """Body of `POST /encode`."""

    texts: list[str] = Field(examples=[["hello", "world"]])
    model: str | None = None
    """Default: the gateway's default model."""


@routes.post(
    "/v1/embeddings/generate", summary="Embed a text", openapi_extra=takes(GenerateRequest)
)
async def generate(
    call: Asked, body: Annotated[GenerateRequest, reads(GenerateRequest)]
) -> Response:
    """Return `embedding` for a text, and `embeddings` for a list of texts."""
    model = await call.model(body.model, body.use_fallback)
    if isinstance(body.text, str):
        result = await call.embed(model, [body.text])
        return answer(call, {"embedding": result.vectors[0], **facts(result)})
    result = await call.embed(model, body.text)
    return answer(call, {"embeddings": list(result.vectors), **facts(result)})


@routes.post("/encode", summary="Embed texts", openapi_extra=takes(EncodeRequest))
async def encode(call: Asked, body: Annotated[EncodeRequest, reads(EncodeRequest)]) -> Response:
    """Return `embeddings`, one for each text."""
    result = await call.embed(await call.model(body.model), body.texts)
    return answer(call, {"embeddings": list(result.vectors), **facts(result)})


def facts(result: Embeddings) -> dict[str, Any]:
    """Return which model made the vectors, and what they can be compared with."""
    return {
        "model": result.model,
        "dimensions": result.vectors.shape[1],
        "provider": result.provider,
        "space": result.space,
        "precision": result.precision,
    }


DIALECT = register(Dialect("platform", routes, openai.error))
