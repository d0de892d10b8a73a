"""The playground: a page to try models on, at `/`, and what it asks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Response
from fastapi.responses import FileResponse
from pydantic import Base64Bytes, Field

from halimede.gateway.calls import Asked, Call, Gateway, answer, cut_off
from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import Body, Dialect, reads, register
from halimede.gateway.errors import Problem
from halimede.gateway.models import kinds
from halimede.gateway.models.served import Model
from halimede.results import Embeddings, ServedModel
from halimede_ops.quantise import similarity as similarity_of

FILES = Path(__file__).parents[1] / "playground"
PAGE = "index.html"
SERVED = (PAGE, "style.css", "icon.svg", "app.js", "api.js", "code.js", "views.js")
"""The page's files."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MAX_TEXTS = 64
"""Maximum texts or images whose similarities are shown."""
MAX_LINES = 1000
"""Maximum lines of a map."""
MAX_MARKED = 8
"""Texts of a request in which the part that was cut off is looked for."""
_IDEOGRAPH = "[\u3040-\u30ff\u3400-\u9fff]"
_WORD = re.compile(rf"{_IDEOGRAPH}|(?:(?!{_IDEOGRAPH})\w)+|[^\w\s]")


async def enabled(call: Asked) -> None:
    """Raise if the gateway serves no playground.

    Raises:
        Problem: it serves none.
    """
    if not call.config.playground:
        raise Problem(404, "The playground is off. gateway.playground turns it on.")


routes = APIRouter(include_in_schema=False, dependencies=[Depends(enabled)])


@routes.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def file(name: str) -> Response:
    """Return a file of the page."""
    if name not in SERVED:
        raise Problem(404, f"The playground has no such file; it has {', '.join(SERVED)}.")
    return FileResponse(FILES / name, headers=dict(HEADERS))


@routes.get("/playground/api/models")
async def models(call: Asked) -> Response:
    """Return the models that are served, and what each can do."""
    served = await call.served.all()
    return answer(call, {"models": [described(m.name, await m.facts()) for m in served]})


def described(name: str, facts: ServedModel) -> dict[str, Any]:
    """Return what the page shows of a model."""
    embeds = kinds.EMBEDDER.has(facts)
    return {
        "name": name,
        "kind": "image" if facts.input == "image" else facts.kind.replace("_", " "),
        "space": facts.space,
        "precision": facts.precision,
        "dims": facts.dims,
        "max_tokens": facts.max_tokens,
        "provider": facts.provider,
        "embeds_texts": embeds,
        "embeds_images": embeds and bool(facts.image_model),
        "ranks": kinds.RERANKER.has(facts),
    }


class SimilarityRequest(Body):
    """Texts to compare with each other."""

    model: str
    texts: list[str] = Field(min_length=1, max_length=MAX_TEXTS)


@routes.post("/playground/api/similarity")
async def similarity(
    call: Asked, body: Annotated[SimilarityRequest, reads(SimilarityRequest)]
) -> Response:
    """Return the cosine of each pair of texts."""
    model = await call.model(body.model)
    result = await call.embed(model, body.texts)
    cosines = cosine(result.vectors, result.vectors)
    return answer(call, {"cosines": cosines, "texts": await told(call, model, body.texts, result)})


class RankRequest(Body):
    """A query, and documents to rank by their relevance to it."""

    query: str
    documents: list[str] = Field(min_length=1, max_length=MAX_TEXTS)
    model: str = ""
    """Embeds the query and the documents. Empty: only the reranker ranks."""
    reranker: str = ""
    """Scores each document. Empty: only the cosines rank."""


@routes.post("/playground/api/rank")
async def rank(call: Asked, body: Annotated[RankRequest, reads(RankRequest)]) -> Response:
    """Return the documents' cosines to the query and a reranker's scores, in their order."""
    if not body.model and not body.reranker:
        raise Problem(422, "Give model, reranker or both.", param="model")
    found: dict[str, Any] = {}
    if body.model:
        model = await call.model(body.model)
        query = await call.embed(model, [body.query], input_type="query")
        documents = await call.embed(model, body.documents, input_type="document")
        found["cosines"] = cosine(query.vectors, documents.vectors)[0]
        found["query"] = (await told(call, model, [body.query], query, "query"))[0]
        found["documents"] = await told(call, model, body.documents, documents, "document")
    if body.reranker:
        ranking = await call.rank(await call.model(body.reranker), body.query, body.documents)
        scores = np.empty(len(ranking), np.float32)
        scores[ranking.indices] = ranking.scores
        found["scores"] = scores
        found["reranker_cut"] = ranking.indices[cut_off(ranking)]
        found["reranker_max_tokens"] = ranking.max_tokens
    return answer(call, found)


class ImagesRequest(Body):
    """Images to rank against texts."""

    model: str
    images: list[Base64Bytes] = Field(min_length=1, max_length=MAX_TEXTS)
    """Image files, in base64."""
    texts: list[str] = Field(min_length=1, max_length=MAX_TEXTS)


@routes.post("/playground/api/images")
async def images(call: Asked, body: Annotated[ImagesRequest, reads(ImagesRequest)]) -> Response:
    """Return the cosine of each text to each image."""
    model = await call.model(body.model)
    if not (await model.facts()).image_model:
        raise Problem(400, f"{model.name} embeds no images.", param="model")
    texts = await call.embed(model, body.texts)
    seen = await call.embed_images(model, body.images)
    return answer(
        call,
        {
            "cosines": cosine(texts.vectors, seen.vectors),
            "texts": await told(call, model, body.texts, texts),
            "images": [str(image) for image in seen.images],
        },
    )


class MapRequest(Body):
    """Texts to draw as points."""

    model: str
    texts: list[str] = Field(min_length=3, max_length=MAX_LINES)


@routes.post("/playground/api/map")
async def texts_map(call: Asked, body: Annotated[MapRequest, reads(MapRequest)]) -> Response:
    """Return the first two principal components of the texts' vectors."""
    model = await call.model(body.model)
    result = await call.embed(model, body.texts)
    points, shares = await asyncio.to_thread(principal_components, result.vectors)
    return answer(call, {"points": points, "shares": shares, "cut": cut_off(result)})


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row to each row: `[n, dims]`, `[m, dims]` → `[n, m]` float32.

    That of a vector of zeros is 0.
    """
    return similarity_of(one, other, "float32").clip(-1, 1)


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each vector's first two principal components `[n, 2]` float32, and the share of the
    variance that each of the two explains `[2]`.

    The sign of a component is free; here its largest value is positive.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    points = left[:, :2] * lengths[:2]
    points *= np.sign(points[np.abs(points).argmax(axis=0), np.arange(points.shape[1])] + 1e-12)
    shares = lengths[:2] ** 2 / max(float((lengths**2).sum()), 1e-12)
    return points.astype(np.float32), shares


async def told(
    call: Call,
    model: Model,
    texts: Sequence[str],
    result: Embeddings,
    input_type: str | None = None,
) -> list[dict[str, Any]]:
    """Return each text's tokens, the token limit, and how much of a text that was cut off was read.

    `read` counts UTF-16 units, as JavaScript does. It is None where nothing was cut off, and in
    texts beyond the first MAX_MARKED that were.
    """
    found = [
        {"tokens": int(tokens), "max_tokens": result.max_tokens, "read": None}
        for tokens in result.tokens
    ]
    marked = cut_off(result)[:MAX_MARKED]
    starts = await asyncio.gather(
        *(
            _start(call, model, texts[i], int(result.tokens[i]), result.max_tokens, input_type)
            for i in marked
        )
    )
    for index, start in zip(marked, starts, strict=True):
        found[index]["read"] = len(start.encode("utf-16-le")) // 2
    return found


async def _start(
    call: Call, model: Model, text: str, total: int, limit: int, input_type: str | None
) -> str:
    """Return the words at the start of a text that the model reads whole.

    The model counts the tokens of starts of the text: that needs no tokenizer here. Starts are
    guessed from the tokens of a longer and a shorter one, and every second time halved.
    """
    counting = Call(Gateway(call.config, call.served), call.caller)  # whose headers nobody gets
    ends = [0, *(word.end() for word in _WORD.finditer(text))][: 2 * limit + 1]
    fits, exceeds, halve = (0, 0), (len(ends) - 1, total), False
    while exceeds[0] - fits[0] > 1:
        share = 0.5 if halve else (limit - fits[1]) / (exceeds[1] - fits[1])
        guess = fits[0] + round(share * (exceeds[0] - fits[0]))
        words = min(max(guess, fits[0] + 1), exceeds[0] - 1)
        start = await counting.embed(model, [text[: ends[words]]], input_type=input_type)
        tokens = int(start.tokens[0])
        if tokens <= limit:
            fits = words, tokens
        else:
            exceeds = words, tokens
        halve = not halve
    return text[: ends[fits[0]]]


DIALECT = register(Dialect("playground", routes, openai.error))


@routes.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """Return the page. It is added after `register`: what is posted to `/` is of TEI's dialect."""
    return FileResponse(FILES / PAGE, headers=dict(HEADERS))
