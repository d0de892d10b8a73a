"""Calls: what every dialect asks, with the rules that hold for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, Request
from fastapi.responses import Response

from halimede.config.gateway import GatewayConfig
from halimede.gateway.edge.keys import Caller
from halimede.gateway.errors import Problem
from halimede.gateway.models.served import Model, Served
from halimede.reranker import ranked
from halimede.results import Embeddings, Ranking, Result

Truncate = Literal["NONE", "START", "END"]
"""What is done with a text beyond the token limit: it is refused, or cut off at its start or end.
"""
UNIT = 1e-3
"""Difference from 1 of the norm of a normalised vector."""


@dataclasses.dataclass
class Gateway:
    """What all calls share."""

    config: GatewayConfig
    served: Served


class Call:
    """One request of a caller: asks models, and keeps what the answer's headers say."""

    def __init__(self, gateway: Gateway, caller: Caller) -> None:
        self.served = gateway.served
        self.config = gateway.config
        self.caller = caller
        self.results: list[Result] = []
        """What was answered."""
        self.inputs = 0
        """Texts, images or documents that were answered."""
        self.tokens = 0
        """Tokens of what was answered; those that are unknown are not counted."""
        self.truncated = 0
        """Texts that were cut off."""
        self.model_name = ""
        """The model that was asked last. Empty: none was found."""

    async def model(self, name: str | None, use_fallback: bool = True) -> Model:
        """Return the model of a name that the caller may ask.

        Raises:
            ModelNotFound: there is none.
            Problem: the caller's key is not for this model.
        """
        model = await self.served.model(name, use_fallback)
        self.model_name = model.name
        self.caller.check_model(model.name)
        return model

    async def embed(
        self,
        model: Model,
        texts: Sequence[str],
        *,
        input_type: str | None = None,
        dimensions: int | None = None,
        truncate: Truncate = "END",
        user: str | None = None,
    ) -> Embeddings:
        """Embed texts: vectors `[texts, dims]` float32."""
        await self.admit(len(texts))
        if user is not None and (await model.facts()).candidate is None:
            user = None  # it only says which candidate answers
        result = await model.embed(texts, input_type, dimensions, user)
        return await self._checked(result, truncate)

    async def embed_parts(
        self,
        model: Model,
        parts: Sequence[str],
        *,
        input_type: str | None = None,
        dimensions: int | None = None,
    ) -> Embeddings:
        """Embed the parts of one text by late chunking: vectors `[parts, dims]` float32."""
        await self.admit(len(parts))
        return await self._checked(await model.embed_parts(parts, input_type, dimensions))

    async def embed_images(
        self, model: Model, images: Sequence[bytes], dimensions: int | None = None
    ) -> Embeddings:
        """Embed image files: vectors `[images, dims]` float32."""
        await self.admit(len(images))
        return await self._checked(await model.embed_images(images, dimensions))

    async def rank(
        self,
        model: Model,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        truncate: Truncate = "END",
    ) -> Ranking:
        """Rank documents by their relevance to a query, the best first."""
        await self.admit(len(documents))
        scores = await model.score([(query, document) for document in documents])
        return ranked(await self._checked(scores, truncate), top_k, list(documents))

    async def ask(
        self,
        ask: Callable[..., Any],
        inputs: Sequence[Any],
        *others: Any,
        truncate: Truncate = "END",
    ) -> Any:
        """Ask a model's `classify`, `embed_sparse` or `embed_multi`."""
        await self.admit(len(inputs))
        return await self._checked(await ask(inputs, *others), truncate)

    def headers(self) -> Mapping[str, str]:
        """Return what the bodies of other dialects have no place for."""
        if not self.results:
            return {}
        first = self.results[0]
        return {
            "halimede-model": first.model,
            "halimede-space": first.space,
            "halimede-precision": first.precision,
            "halimede-provider": first.provider,
            "halimede-truncated": str(self.truncated),
            "halimede-cached": str(sum(int(np.sum(r.cached)) for r in self.results)),
        }

    async def admit(self, count: int) -> None:
        """Raise unless the caller may ask about so many inputs now.

        Raises:
            Problem: there are too many, or none is left of the key's quota.
        """
        if count > self.config.max_inputs:
            raise Problem(
                413,
                f"the request has {count:,} inputs; at most {self.config.max_inputs:,} are taken. "
                "Send several requests.",
            )
        await self.caller.check_tokens()

    async def _checked(self, result: Any, truncate: Truncate = "END") -> Any:
        """Return a result that the caller may have.

        Raises:
            Problem: it is of another space than the caller's, has too many tokens, or a text was
                cut off although the caller forbids it.
        """
        self.results.append(result)
        tokens = int(np.maximum(result.tokens, 0).sum())
        self.inputs += len(result)
        self.tokens += tokens
        self.truncated += len(cut_off(result))
        await self.caller.charge(tokens)
        pinned = self.caller.space
        if pinned and result.space != pinned:
            raise Problem(
                409,
                f"the answer is of space {result.space}, and halimede-space asks for another. "
                "Embed the stored texts anew with this model, or ask the model that they are of.",
                headers={"x-should-retry": "false"},
            )
        limit = self.config.max_request_tokens
        if limit and tokens > limit:
            raise Problem(413, f"the request has {tokens:,} tokens; at most {limit:,} are taken.")
        if truncate != "END":
            check_whole(result, truncate)
        return result


def cut_off(result: Result) -> np.ndarray:
    """Return the indices of the texts that were cut off: `[n]` int64, those known."""
    if not result.max_tokens:
        return np.empty(0, np.int64)
    is_cut_off = result.truncated
    return np.flatnonzero(is_cut_off.data & ~np.ma.getmaskarray(is_cut_off))  # type: ignore[no-untyped-call]


def check_whole(result: Result, truncate: Truncate) -> None:
    """Raise if a text was cut off.

    Raises:
        Problem: one was. The models cut at the end alone, so START is refused then, too.
    """
    cut = cut_off(result)
    if not len(cut):
        return
    index = int(cut[0])
    what = "" if truncate == "NONE" else " The model cuts texts at their end alone."
    raise Problem(
        400,
        f"input {index} has {int(result.tokens[index]):,} tokens; {result.model} takes "
        f"{result.max_tokens:,}, and the request does not let it be cut off.{what}",
        "input_too_long",
    )


async def call(request: Request) -> Call:
    """Return the call of a request, for FastAPI."""
    call = Call(request.app.state.gateway, request.state.caller)
    request.state.call = call
    return call


Asked = Annotated[Call, Depends(call)]
"""Parameter of an endpoint: its call."""


def answer(call: Call, body: Any, status: int = 200) -> Response:
    """Return a body of JSON types and arrays as the answer to a call."""
    import orjson

    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, dict(call.headers()), "application/json")
