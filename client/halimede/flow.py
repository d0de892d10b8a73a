"""The one way from texts to labelled embeddings, as coroutines on the client's event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from halimede import requests
from halimede.chain import Chain, all_failed
from halimede.link import Deadline, Link
from halimede.providers.base import Answer, check_dimensions
from halimede.results import Embeddings, ServedModel
from halimede.statistics import Statistics
from halimede_ops.errors import (
    DeadlineExceeded,
    HalimedeError,
    InvalidInput,
    ModelChanged,
    ServerError,
)

MODEL_CHANGES = 5
"""Times that a call is begun anew because the model changed under it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What a caller asks for."""

    texts: Sequence[bytes]
    input_type: str | None = None
    dimensions: int | None = None
    output_type: str = "float32"
    deadline_s: float | None = None
    on_progress: Callable[[int], Any] | None = None
    """Told how many texts were embedded by each request."""


class Rows(NamedTuple):
    """Vectors of the texts of a call."""

    vectors: np.ndarray
    """`[texts, dims]` float32."""
    tokens: np.ndarray
    """`[texts]` int32."""
    cached: np.ndarray
    """`[texts]` bool."""


class Flow:
    """Embeds calls through a chain."""

    def __init__(self, chain: Chain, statistics: Statistics) -> None:
        self.chain = chain
        self.statistics = statistics

    async def embed(self, call: Call) -> Embeddings:
        """The embeddings of a call: all from one provider, in one space and precision.

        Raises:
            DeadlineExceeded: it was not done within `deadline_s`.
            HalimedeError: no provider could answer; the first provider's error.
        """
        began = time.perf_counter()
        try:
            link, result = await asyncio.wait_for(self._on_any(call), call.deadline_s)
        except asyncio.TimeoutError:
            self.statistics.gave_up("DeadlineExceeded")
            raise DeadlineExceeded(
                f"{len(call.texts)} texts were not embedded within {call.deadline_s:g} s. Raise "
                "deadline_s, or give fewer texts."
            ) from None
        except HalimedeError as error:
            self.statistics.gave_up(type(error).__name__)
            raise
        self.statistics.answered(
            link.name,
            len(result),
            int(result.cached.sum()),
            time.perf_counter() - began,
            fallback=link is not self.chain.first,
        )
        return result

    async def describe(self) -> ServedModel:
        """The first provider's model as it is now."""
        return await self.chain.first.model(Deadline(None), fresh_s=0)

    async def stats(self) -> dict[str, Any]:
        """What was done so far, and the models heard of."""
        models = {
            link.name: dataclasses.asdict(link.known) for link in self.chain.links if link.known
        }
        return {**self.statistics.summary(), "models": models}

    async def health(self) -> list[dict[str, Any]]:
        """One report a provider, in the chain's order."""
        return list(await asyncio.gather(*[link.report() for link in self.chain.links]))

    async def close(self) -> None:
        """Close every provider; a second call does nothing."""
        await asyncio.gather(*[link.close() for link in self.chain.links])

    async def _on_any(self, call: Call) -> tuple[Link, Embeddings]:
        """The result of the first link that gives one; each begins the whole call anew."""
        deadline = Deadline(call.deadline_s)
        failures: list[tuple[Link, HalimedeError]] = []
        for link in self.chain.in_order():
            try:
                return link, await self._on(link, call, deadline)
            except HalimedeError as error:
                if isinstance(error, InvalidInput) and link is self.chain.first:
                    raise
                failures.append((link, error))
        raise all_failed(failures)

    async def _on(self, link: Link, call: Call, deadline: Deadline) -> Embeddings:
        """The result of one link; begun anew when its model changes meanwhile."""
        for _ in range(MODEL_CHANGES):
            model = await link.model(deadline, fresh_s=float("inf"))
            self.chain.admit(link, model)
            try:
                return await self._of(link, model, call, deadline)
            except ModelChanged:
                link.forget()
        raise ServerError(
            f"{link.name} changed its model {MODEL_CHANGES} times during one call. Do its "
            "addresses serve the same model?"
        )

    async def _of(
        self, link: Link, model: ServedModel, call: Call, deadline: Deadline
    ) -> Embeddings:
        asked = link.options.dimensions if call.dimensions is None else call.dimensions
        dims = check_dimensions(asked, model)

        async def compute(indices: Sequence[int]) -> Rows:
            return await self._compute(link, model, call, asked, dims, indices, deadline)

        rows = await compute(range(len(call.texts)))
        return Embeddings(
            vectors=rows.vectors,
            tokens=rows.tokens,
            cached=rows.cached,
            model=model.name,
            space=model.space,
            precision=model.precision,
            max_tokens=model.max_tokens,
            provider=model.provider,
        )

    async def _compute(
        self,
        link: Link,
        model: ServedModel,
        call: Call,
        dimensions: int | None,
        dims: int,
        indices: Sequence[int],
        deadline: Deadline,
    ) -> Rows:
        """The vectors of these texts of a call, in the order of `indices`."""
        texts = [call.texts[index] for index in indices]
        vectors = np.empty((len(texts), dims), np.float32)
        tokens = np.empty(len(texts), np.int32)

        async def send(request: list[int]) -> None:
            answer = await link.embed(
                [texts[row] for row in request], call.input_type, dimensions, deadline
            )
            _check(answer, model, len(request), dims)
            vectors[request] = answer.vectors
            tokens[request] = answer.tokens
            if call.on_progress is not None:
                call.on_progress(len(request))

        plan = requests.plan(texts, link.most_texts(model), model.max_tokens)
        await requests.together(
            [lambda request=request: send(request) for request in plan],  # type: ignore[misc]
            requests.REQUESTS_IN_FLIGHT,
        )
        return Rows(vectors, tokens, np.zeros(len(texts), np.bool_))


def _check(answer: Answer, model: ServedModel, rows: int, dims: int) -> None:
    """Nothing when the answer is of this model and shape."""
    if not answer.model.is_alike(model):
        raise ModelChanged(f"{model.name} was changed. Send again.")
    if answer.vectors.shape != (rows, dims):
        raise ServerError(
            f"{model.name} was asked for {rows} × {dims}; it gave {answer.vectors.shape}."
        )
