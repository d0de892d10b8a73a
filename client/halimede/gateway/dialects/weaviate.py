"""The dialect of Weaviate's module text2vec-transformers: what it asks its inference container."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from halimede.gateway.calls import Asked, answer
from halimede.gateway.dialects.dialect import Body, Dialect, reads, register, takes
from halimede.gateway.dialects.health import check_ready
from halimede.gateway.dialects.openai import input_type
from halimede.gateway.errors import Problem

routes = APIRouter()


class VectorsConfig(Body):
    """How Weaviate wants a text embedded. `pooling_strategy` changes nothing: it is the model's."""

    task_type: str | None = None
    """`query` or `passage`."""


class VectorsRequest(Body):
    """Body of `POST /vectors`: a text or texts, for the default model."""

    text: str | None = Field(None, examples=["hello world"])
    texts: list[str] | None = None
    config: VectorsConfig = VectorsConfig()

    @model_validator(mode="after")
    def _has_one(self) -> VectorsRequest:
        if (self.text is None) == (self.texts is None):
            raise ValueError("give text or texts")
        return self


@routes.post("/vectors", summary="Embed a text or texts", openapi_extra=takes(VectorsRequest))
@routes.post("/vectors/", include_in_schema=False)
async def vectors(call: Asked, body: Annotated[VectorsRequest, reads(VectorsRequest)]) -> Response:
    """Return `vector` for a text, and `vectors` for texts."""
    model = await call.model(None)
    texts = [body.text or ""] if body.texts is None else body.texts
    result = await call.embed(model, texts, input_type=input_type(body.config.task_type))
    dim = result.vectors.shape[1]
    if body.texts is None:
        return answer(call, {"text": body.text, "vector": result.vectors[0], "dim": dim})
    return answer(call, {"texts": body.texts, "vectors": list(result.vectors), "dim": dim})


@routes.get("/.well-known/live", summary="Is the gateway alive?", status_code=204)
async def live() -> Response:
    """Return nothing."""
    return Response(status_code=204)


@routes.get("/.well-known/ready", summary="Does the default model answer?", status_code=204)
async def ready(call: Asked) -> Response:
    """Return nothing if the default model describes itself."""
    await check_ready(call.served)
    return Response(status_code=204)


@routes.get("/meta", summary="Describe the default model")
async def meta(call: Asked) -> Response:
    """Return the facts of the default model."""
    model = await call.model(None)
    facts = await model.facts()
    return answer(
        call,
        {
            "model": {
                "name": model.name,
                "space": facts.space,
                "precision": facts.precision,
                "dims": facts.dims,
                "max_tokens": facts.max_tokens,
                "provider": facts.provider,
            }
        },
    )


def error(problem: Problem) -> tuple[int, Any]:
    """Return a problem as the module's container does."""
    return problem.status, {"error": problem.message}


DIALECT = register(Dialect("weaviate", routes, error))
