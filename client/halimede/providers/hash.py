"""Vectors from a hash of the bytes: local and deterministic, for development and tests."""

from __future__ import annotations

import asyncio

from pydantic import Field

from halimede.inputs.content import InputKind, serialise
from halimede.providers import hashing
from halimede.providers.base import Answer, Request, cut, prompt, unknown_tokens
from halimede.providers.base import Options as BaseOptions
from halimede.results import ServedModel

MAX_BATCH_SIZE = 1024
"""Computed at once on the client's event loop, in about 10 ms."""
UNLIMITED_TOKENS = 2**31 - 1


class Options(BaseOptions):
    """Vectors from a hash of the bytes."""

    provider: str = "hash"
    model_id: str = "hash"
    dims: int = Field(hashing.LEAST_DIMS, ge=hashing.LEAST_DIMS, le=hashing.MOST_DIMS)
    """Length of a vector."""


def connect(options: Options) -> Hash:
    """The provider for these options."""
    return Hash(options)


class Hash:
    """Unit vectors that depend on the item's bytes alone. They say nothing of its meaning."""

    def __init__(self, options: Options) -> None:
        self.name = f"hash:{options.model_id}"
        self._model = ServedModel(
            name=options.model_id,
            space=hashing.space(options.dims),
            precision="fp32",
            dims=options.dims,
            max_tokens=UNLIMITED_TOKENS,
            max_batch_size=MAX_BATCH_SIZE,
            provider="hash",
        )

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """The model: always the same, of every kind."""
        return self._model

    async def health(self, timeout_s: float) -> None:
        """Nothing: it is always there."""

    async def close(self) -> None:
        """Nothing to give back."""

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The vectors; token counts are not known, and images are not looked into."""
        prompt(request.input_type, {}, self._model.name)  # refuses an unknown one
        await asyncio.sleep(0)  # other calls and their deadlines have their turn
        hashed = [serialise(item) for item in request.items]
        vectors = hashing.embed(hashed, self._model.dims)
        return Answer(cut(vectors, request.dimensions), unknown_tokens(len(hashed)), self._model)
