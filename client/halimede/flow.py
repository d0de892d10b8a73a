"""The one way from texts to labelled embeddings, as coroutines on the client's event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from halimede import requests, tracing
from halimede.cache import Cache, Entries, Expect
from halimede.cache import keys as cache_keys
from halimede.chain import Chain
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
    SpaceRefused,
)
from halimede_ops.quantise import OutputType, quantise

MODEL_CHANGES = 5
"""Times that a call is begun anew because the model changed under it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What a caller asks for."""

    texts: Sequence[bytes]
    input_type: str | None = None
    dimensions: int | None = None
    output_type: OutputType = "float32"
    ranges: np.ndarray | None = None
    """`[2, dims]`, low and high of each component, for int8 and uint8."""
    deadline_s: float | None = None
    on_progress: Callable[[int], Any] | None = None
    """Told how many texts were embedded by each request."""


class Flow:
    """Embeds calls through a chain."""

    def __init__(
        self,
        chain: Chain,
        statistics: Statistics,
        cache: Cache | None = None,
        model_check_s: float = 1.0,
    ) -> None:
        """A flow; `model_check_s` as in `CacheConfig`."""
        self.chain = chain
        self.statistics = statistics
        self.cache = cache
        self.model_check_s = model_check_s
        self._is_closed = False

    async def embed(self, call: Call) -> Embeddings:
        """The embeddings of a call: all from one provider, in one space and precision.

        Raises:
            DeadlineExceeded: it was not done within `deadline_s`.
            HalimedeError: no provider could answer; the first provider's error.
        """
        if self._is_closed:
            raise HalimedeError("this embedder is closed. Open another.")
        with tracing.span("halimede.embed", len(call.texts)) as facts:
            result = await self._counted(call)
            facts |= {
                "halimede.model": result.model,
                "halimede.provider": result.provider,
                "halimede.space": result.space,
                "halimede.cached": int(result.cached.sum()),
            }
            return result

    async def _counted(self, call: Call) -> Embeddings:
        """The result within the deadline; statistics hear how it went."""
        began = time.perf_counter()
        try:
            link, result = await asyncio.wait_for(self._on_any(call), call.deadline_s)
        except asyncio.TimeoutError:
            if call.deadline_s is None:  # a provider's own bug
                raise
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
        cache = {} if self.cache is None else self.cache.stats()
        return {**self.statistics.summary(), "models": models, "cache": cache}

    async def clear_cache(self) -> None:
        """Forget every cached vector in every tier.

        Raises:
            HalimedeError: a tier failed; the others are cleared.
        """
        if self.cache is not None:
            await self.cache.clear()

    async def health(self) -> list[dict[str, Any]]:
        """One report a provider, in the chain's order."""
        return list(await asyncio.gather(*[link.report() for link in self.chain.links]))

    async def close(self) -> None:
        """Close cache and providers; a second call does nothing."""
        self._is_closed = True
        if self.cache is not None:
            await self.cache.close()
        await asyncio.gather(*[link.close() for link in self.chain.links])

    async def _on_any(self, call: Call) -> tuple[Link, Embeddings]:
        """The result of the first link that gives one; each begins the whole call anew."""
        deadline = Deadline(call.deadline_s)
        failures: dict[Link, HalimedeError] = {}
        for link in self.chain.in_order():
            try:
                return link, await self._on(link, call, deadline)
            except HalimedeError as error:
                if isinstance(error, InvalidInput) and link is self.chain.first:
                    raise
                failures[link] = error
        raise self.chain.failed(failures)

    async def _on(self, link: Link, call: Call, deadline: Deadline) -> Embeddings:
        """The result of one link; begun anew when its model changes meanwhile."""
        cache = self.cache if link.options.cache_enabled else None
        fresh_s = math.inf if cache is None else self.model_check_s
        for _ in range(MODEL_CHANGES):
            model = await link.model(deadline, fresh_s)
            try:
                self.chain.admit(link, model)
            except SpaceRefused:
                link.forget()
                raise
            asked = link.options.dimensions if call.dimensions is None else call.dimensions
            job = _Job(link, model, call, asked, check_dimensions(asked, model), deadline, cache)
            try:
                return await job.result()
            except ModelChanged:
                link.forget()
        raise ServerError(
            f"{link.name} changed its model {MODEL_CHANGES} times during one call. Do its "
            "addresses serve the same model?"
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """One call at one link, while its model is this one."""

    link: Link
    model: ServedModel
    call: Call
    dimensions: int | None
    """As asked of the provider."""
    dims: int
    """Length of a vector."""
    deadline: Deadline
    cache: Cache | None

    async def result(self) -> Embeddings:
        """The embeddings of the call's texts.

        Raises:
            ModelChanged: the model is another now.
        """
        step = requests.WINDOW_TEXTS
        count = len(self.call.texts)
        windows = [range(start, min(start + step, count)) for start in range(0, count, step)]
        rows = await requests.together(
            [functools.partial(self._window, window) for window in windows],
            requests.WINDOWS_IN_FLIGHT,
        )
        entries = [entries for entries, _ in rows]
        floats = _joined([part.vectors for part in entries], (0, self.dims), np.float32)
        return Embeddings(
            vectors=quantise(floats, self.call.output_type, self.call.ranges),
            tokens=_joined([part.tokens for part in entries], (0,), np.int32),
            cached=_joined([cached for _, cached in rows], (0,), np.bool_),
            model=self.model.name,
            space=self.model.space,
            precision=self.model.precision,
            max_tokens=self.model.max_tokens,
            provider=self.model.provider,
            output_type=self.call.output_type,
        )

    async def _window(self, rows: Sequence[int]) -> tuple[Entries, np.ndarray]:
        """The entries of some rows of the call, and whether each came from the cache."""
        texts = [self.call.texts[row] for row in rows]

        async def compute(missing: Sequence[int]) -> Entries:
            return await self._compute([texts[row] for row in missing])

        if self.cache is None:
            return await compute(range(len(texts))), np.zeros(len(texts), np.bool_)
        keys = cache_keys(
            texts,
            space=self.model.space,
            precision=self.model.precision,
            input_type=self.call.input_type,
            dims=self.dims,
        )
        expect = Expect(self.dims, self.link.options.cache_ttl_s)
        entries, cached = await self.cache.get_or_compute(keys, compute, expect)
        self._advance(int(cached.sum()))
        return entries, cached

    async def _compute(self, texts: Sequence[bytes]) -> Entries:
        """The entries of the texts, asked of the provider in requests."""
        vectors = np.empty((len(texts), self.dims), np.float32)
        tokens = np.empty(len(texts), np.int32)

        async def send(request: list[int]) -> None:
            answer = await self.link.embed(
                [texts[row] for row in request],
                self.call.input_type,
                self.dimensions,
                self.deadline,
            )
            _check(answer, self.model, len(request), self.dims)
            vectors[request] = answer.vectors
            tokens[request] = answer.tokens
            self._advance(len(request))

        plan = requests.plan(texts, self.link.most_texts(self.model), self.model.max_tokens)
        await requests.together(
            [functools.partial(send, request) for request in plan], requests.REQUESTS_IN_FLIGHT
        )
        return Entries(vectors, tokens)

    def _advance(self, texts: int) -> None:
        if self.call.on_progress is not None:
            self.call.on_progress(texts)


def _check(answer: Answer, model: ServedModel, rows: int, dims: int) -> None:
    """Nothing when the answer is of this model and shape."""
    if not answer.model.is_alike(model):
        raise ModelChanged(f"{model.name} was changed. Send again.")
    if answer.vectors.shape != (rows, dims):
        raise ServerError(
            f"{model.name} was asked for {rows} × {dims}; it gave {answer.vectors.shape}."
        )


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(empty, dtype)
