"""The one way from items to labelled embeddings, as coroutines on the client's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from halimede.cache import Cache, Entries, Expect
from halimede.cache import keys as cache_keys
from halimede.inputs.content import Content, Input, InputKind, ReadOptions
from halimede.inputs.urls import Fetch
from halimede.observability import tracing
from halimede.observability.statistics import Statistics
from halimede.pipeline import requests
from halimede.pipeline.chain import Chain
from halimede.pipeline.link import Deadline, Link
from halimede.providers.base import Answer, Request, reindexed
from halimede.results import IMAGE, Embeddings, ImageInfo, ServedModel
from halimede_ops.errors import (
    DeadlineExceeded,
    FetchFailed,
    HalimedeError,
    ImageTooLarge,
    InvalidImage,
    InvalidInput,
    InvalidText,
    ModelChanged,
    ServerError,
    SpaceRefused,
    UrlRefused,
)
from halimede_ops.quantise import OutputType, quantise
from halimede_ops.vectors import check_dimensions

MODEL_CHANGES = 5
"""Times that a call is begun anew because the model changed under it."""
OF_ONE_ITEM = (InvalidImage, ImageTooLarge, InvalidText, UrlRefused, FetchFailed)
"""Errors that are about one item and say nothing of the others."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What a caller asks for."""

    items: Sequence[Input]
    kind: InputKind = "text"
    input_type: str | None = None
    dimensions: int | None = None
    output_type: OutputType = "float32"
    ranges: np.ndarray | None = None
    """`[2, dims]`, low and high of each component, for int8 and uint8."""
    deadline_s: float | None = None
    on_progress: Callable[[int], Any] | None = None
    """Told how many items more are done."""
    errors: Literal["raise", "collect"] = "raise"
    """What becomes of an item that is wrong: it ends the call, or is left out and told."""
    first: int = 0
    """Which item of its stream the call begins with."""
    sticky_key: bytes | None = None
    """What decides whether a canary answers; None: each item for itself."""


class Flow:
    """Embeds calls through a chain."""

    def __init__(
        self,
        chain: Chain,
        statistics: Statistics,
        fetch: Fetch,
        cache: Cache | None = None,
        model_check_s: float = 1.0,
    ) -> None:
        """A flow; `model_check_s` as in `CacheConfig`."""
        self.chain = chain
        self.statistics = statistics
        self.cache = cache
        self.model_check_s = model_check_s
        self.fetch = fetch
        self._room = asyncio.Semaphore(requests.IMAGES_IN_FLIGHT)
        self._is_closed = False

    async def embed(self, call: Call) -> Embeddings:
        """The embeddings of a call: all from one provider, in one space and precision.

        Raises:
            DeadlineExceeded: it was not done within `deadline_s`.
            HalimedeError: no provider could answer; the first provider's error.
        """
        if self._is_closed:
            raise HalimedeError("this embedder is closed. Open another.")
        with tracing.span("halimede.embed", call.kind, len(call.items)) as facts:
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
        except TimeoutError:
            if call.deadline_s is None:  # a provider's own bug
                raise
            self.statistics.gave_up("DeadlineExceeded")
            raise DeadlineExceeded(
                f"{len(call.items)} {call.kind}s were not embedded within {call.deadline_s:g} s. "
                f"Raise deadline_s, or give fewer {call.kind}s."
            ) from None
        except HalimedeError as error:
            self.statistics.gave_up(type(error).__name__)
            raise
        self.statistics.answered(
            link.name,
            call.kind,
            len(result),
            int(result.cached.sum()),
            time.perf_counter() - began,
            fallback=link is not self.chain.first,
        )
        for wrong in result.errors.values():
            self.statistics.left_out(type(wrong).__name__)
        return result

    async def describe(self) -> ServedModel:
        """The first provider's model as it is now."""
        return await self.chain.first.model(None, Deadline(None), fresh_s=0)

    async def stats(self) -> dict[str, Any]:
        """What was done so far, and the models heard of."""
        models = {
            f"{model.provider}:{model.name}": dataclasses.asdict(model)
            for link in self.chain.links
            for model in link.known
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
            model = await link.model(call.kind, deadline, fresh_s)
            try:
                self.chain.admit(link, model)
            except SpaceRefused:
                link.forget()
                raise
            asked = link.options.dimensions if call.dimensions is None else call.dimensions
            read_options = ReadOptions(model.max_image_bytes, self.fetch)
            dims = check_dimensions(asked, model)
            room = contextlib.nullcontext() if call.kind == "text" else self._room
            job = _Job(link, model, call, read_options, room, asked, dims, deadline, cache)
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
    read_options: ReadOptions
    room: contextlib.AbstractAsyncContextManager[None]
    """Entered for each window."""
    dimensions: int | None
    """As asked of the provider."""
    dims: int
    """Length of a vector."""
    deadline: Deadline
    cache: Cache | None

    async def result(self) -> Embeddings:
        """The embeddings of the call's items.

        Raises:
            ModelChanged: the model is another now.
        """
        step, in_flight = requests.WINDOWING[self.call.kind]
        count = len(self.call.items)
        windows = [range(start, min(start + step, count)) for start in range(0, count, step)]
        settled = await requests.together(
            [functools.partial(self._settled, window) for window in windows], in_flight
        )
        parts = [part for part in settled if isinstance(part, _Part)]
        entries = [part.entries for part in parts]
        floats = _joined([part.vectors for part in entries], (0, self.dims), np.float32)
        return Embeddings(
            vectors=quantise(floats, self.call.output_type, self.call.ranges),
            tokens=_joined([part.tokens for part in entries], (0,), np.int32),
            cached=_joined([part.cached for part in parts], (0,), np.bool_),
            indices=self.call.first
            + _joined(
                [np.arange(part.rows.start, part.rows.stop) for part in parts], (0,), np.int64
            ),
            versions=_joined([part.versions for part in parts], (0,), np.int64),
            images=() if self.call.kind == "text" else _images(entries),
            errors={
                window[0] + self.call.first: failed
                for window, failed in zip(windows, settled, strict=True)
                if isinstance(failed, HalimedeError)
            },
            model=self.model.name,
            space=self.model.space,
            precision=self.model.precision,
            max_tokens=self.model.max_tokens,
            provider=self.model.provider,
            output_type=self.call.output_type,
        )

    async def _settled(self, rows: range) -> _Part | HalimedeError:
        """The entries of some rows of the call, or what is wrong with the only one."""
        first = rows.start + self.call.first
        try:
            async with self.room:
                with reindexed(range(first, first + len(rows))):
                    return await self._window(rows)
        except OF_ONE_ITEM as error:
            if self.call.kind == "text":
                raise
            placed = _placed(error, self.call.kind, first)
            if self.call.errors == "raise":
                raise placed from None
            self._advance(1)
            return placed

    async def _window(self, rows: range) -> _Part:
        """The entries of some rows of the call."""
        given = self.call.items[rows.start : rows.stop]
        items = [
            one if isinstance(one, bytes) else await one.read(self.read_options) for one in given
        ]
        if self.cache is None:
            entries, versions = await self._compute(items)
            return _Part(rows, entries, np.zeros(len(rows), np.bool_), versions)
        made_by: dict[bytes, int] = {}

        async def compute(missing: Sequence[int]) -> Entries:
            with reindexed(missing):
                entries, versions = await self._compute([items[row] for row in missing])
            made_by.update(zip((keys[row] for row in missing), versions.tolist(), strict=True))
            return entries

        keys = cache_keys(
            items,
            kind=self.call.kind,
            space=self.model.space,
            precision=self.model.precision,
            input_type=self.call.input_type,
            dims=self.dims,
        )
        expect = Expect(self.dims, self.link.options.cache_ttl_s)
        entries, cached = await self.cache.get_or_compute(keys, compute, expect)
        self._advance(int(cached.sum()))
        versions = np.array([made_by.get(key, 0) for key in keys], np.int64)
        return _Part(rows, entries, cached, versions)

    async def _compute(self, items: Sequence[Content]) -> tuple[Entries, np.ndarray]:
        """The entries of the items, asked of the provider in requests, and their versions."""
        versions = np.zeros(len(items), np.int64)
        vectors = np.empty((len(items), self.dims), np.float32)
        tokens = np.empty(len(items), np.int32)
        images = np.zeros(len(items), IMAGE)

        async def send(rows: list[int]) -> None:
            request = Request(
                [items[row] for row in rows],
                self.call.kind,
                self.call.input_type,
                self.dimensions,
                self.call.sticky_key,
            )
            with reindexed(rows):
                answer = await self.link.embed(request, self.deadline)
            _check(answer, self.model, len(rows), self.dims)
            vectors[rows] = answer.vectors
            tokens[rows] = answer.tokens
            versions[rows] = answer.row_versions
            if answer.images is not None:
                images[rows] = answer.images
            self._advance(len(rows))

        plan = requests.plan(items, self.link.most_texts(self.model), self.model.max_tokens)
        await requests.together(
            [functools.partial(send, request) for request in plan], requests.REQUESTS_IN_FLIGHT
        )
        return Entries(vectors, tokens, images), versions

    def _advance(self, items: int) -> None:
        if self.call.on_progress is not None:
            self.call.on_progress(items)


class _Part(NamedTuple):
    """Some rows of a call, embedded."""

    rows: range
    entries: Entries
    cached: np.ndarray
    """`[rows]` bool."""
    versions: np.ndarray
    """`[rows]` int64."""


def _check(answer: Answer, model: ServedModel, rows: int, dims: int) -> None:
    """Nothing when the answer is of this model and shape."""
    if not answer.model.is_alike(model):
        raise ModelChanged(f"{model.name} was changed. Send again.")
    if answer.vectors.shape != (rows, dims):
        raise ServerError(
            f"{model.name} was asked for {rows} × {dims}; it gave {answer.vectors.shape}."
        )


def _placed(error: InvalidInput, kind: InputKind, index: int) -> InvalidInput:
    """The error of a window's only input. While the input was read, its index was not known."""
    if error.index is not None:
        return error
    return type(error)(f"{kind} {index}: {error}", index=index)


def _images(entries: list[Entries]) -> tuple[ImageInfo, ...]:
    """What was told of each row's image."""
    facts = _joined([part.images for part in entries if part.images is not None], (0,), IMAGE)
    return tuple(ImageInfo(int(w), int(h), name.decode()) for w, h, name in facts.tolist())


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(empty, dtype)
