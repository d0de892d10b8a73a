"""The pipeline: from the inputs of a call to its labelled result.

A call is cut into windows, a window is looked up in the cache and cut into requests, and each
request is sent to a provider. All of it is a flow: see `halimede.pipeline.waiting`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from halimede.cache import Cache, Entries, Expect
from halimede.cache import keys as cache_keys
from halimede.inputs.content import (
    RAGGED,
    TEXT_KINDS,
    Content,
    Input,
    InputKind,
    OutputKind,
    ReadOptions,
    plural,
)
from halimede.inputs.options import CallOptions
from halimede.inputs.urls import Fetch
from halimede.observability import tracing
from halimede.observability.progress import NO_PROGRESS, Progress
from halimede.observability.statistics import Statistics
from halimede.pipeline import batching
from halimede.pipeline.fallback import Fallback, Rules
from halimede.pipeline.guard import GuardedProvider
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import Gate, Lifetime
from halimede.pipeline.tasks import Answered, Task
from halimede.pipeline.waiting import Flow, result_of, together
from halimede.providers.base import (
    Answer,
    Options,
    Provider,
    Request,
    concatenate,
    ragged,
    reindexed,
)
from halimede.results import Result, ServedModel
from halimede_ops.errors import (
    DeadlineExceeded,
    FetchFailed,
    HalimedeError,
    ImageTooLarge,
    InvalidImage,
    InvalidInput,
    InvalidText,
    ModelChanged,
    NonFiniteVector,
    ServerError,
    SpaceRefused,
    UnsupportedInput,
    UrlRefused,
)
from halimede_ops.vectors import check_dimensions, check_finite

R = TypeVar("R", bound=Result)
MODEL_CHANGES = 5
"""Times that a call begins anew because the model changed during it."""
CLOCK_S = 0.005
"""A request that ends this shortly before the call's deadline ended because of it."""
ABOUT_ONE_INPUT = (
    InvalidImage,
    ImageTooLarge,
    InvalidText,
    UrlRefused,
    FetchFailed,
    NonFiniteVector,
)
"""Errors about one input, which say nothing of the others."""


@dataclasses.dataclass(frozen=True)
class Call(Generic[R]):
    """The inputs and options of one call."""

    inputs: Sequence[Input]
    task: Task[R]
    options: CallOptions
    first: int = 0
    """Index of the first input in its stream."""
    progress: Progress = NO_PROGRESS
    may_block: bool = False
    """Whether the caller's thread waits for this call."""


class Pipeline:
    """Answers calls through a fallback of providers. Safe to use from several threads."""

    def __init__(
        self,
        options: Sequence[Options],
        rules: Rules,
        fetch: Fetch,
        *,
        providers: Sequence[Provider] = (),
        cache: Cache | None = None,
        model_check_s: float,
    ) -> None:
        """A pipeline over these providers, or over those that the options describe.

        `model_check_s` is explained in `CacheConfig`.
        """
        self.statistics = Statistics()
        self._lifetime = Lifetime()
        guarded = [
            GuardedProvider(
                one, self.statistics, self._lifetime, providers[place] if providers else None
            )
            for place, one in enumerate(options)
        ]
        self._fallback = Fallback(guarded, rules)
        self._cache = cache
        self._model_check_s = model_check_s
        self.fetch = fetch
        self.readers = Pool(batching.IMAGES_IN_FLIGHT, "read")
        self.images = Gate(batching.IMAGES_IN_FLIGHT)
        """Entered by each window of images."""

    def embed(self, call: Call[R]) -> Flow[R]:
        """Return the result of a call: all from one provider, in one space and precision.

        Raises:
            DeadlineExceeded: it was not done within `deadline_s`.
            HalimedeError: no provider could answer. It is the first provider's error.
        """
        self._lifetime.check()
        deadline_s = call.options.deadline_s
        until_s = math.inf if deadline_s is None else time.monotonic() + deadline_s
        began_s = time.perf_counter()
        with tracing.span("halimede.embed", call.task.kind, len(call.inputs)) as facts:
            try:
                flow = self._on_any(call, until_s)
                provider, result = yield from self._lifetime.run(flow, until_s)
            except (TimeoutError, HalimedeError) as error:
                if isinstance(error, TimeoutError) or time.monotonic() >= until_s - CLOCK_S:
                    inputs = plural(call.task.kind)
                    done = "scored" if call.task.output == "scores" else "embedded"
                    error = DeadlineExceeded(
                        f"{len(call.inputs)} {inputs} were not {done} within {deadline_s:g} s. "
                        f"Raise deadline_s, or give fewer {inputs}."
                    )
                self.statistics.gave_up(type(error).__name__)
                raise error from None
            cached = 0 if self._cache is None else int(result.cached.sum())
            facts |= {
                "halimede.output": call.task.output,
                "halimede.model": result.model,
                "halimede.provider": result.provider,
                "halimede.space": result.space,
                "halimede.cached": cached,
            }
        self.statistics.answered(
            provider.name,
            call.task.kind,
            len(result),
            cached,
            time.perf_counter() - began_s,
            fallback=provider is not self._fallback.first,
        )
        for left_out in result.errors.values():
            self.statistics.left_out(type(left_out).__name__)
        return result

    @property
    def first_options(self) -> Options:
        """The configuration of the first provider's model."""
        return self._fallback.first.options

    def describe(self, kind: InputKind | None = None) -> Flow[ServedModel]:
        """Return the first provider's current model, for inputs of this kind."""
        self._lifetime.check()
        return (yield from self._fallback.first.model(kind, math.inf, max_age_s=0))

    def health(self) -> Flow[list[dict[str, Any]]]:
        """Return a report of each provider, in the order of the fallback."""
        self._lifetime.check()
        providers = self._fallback.providers
        reports = together([provider.report() for provider in providers], len(providers))
        return (yield from self._lifetime.run(reports, math.inf))

    def stats(self) -> dict[str, Any]:
        """Return the statistics so far, and the models that were described, as JSON types."""
        models = {
            f"{model.provider}:{model.name}": dataclasses.asdict(model)
            for provider in self._fallback.providers
            for model in provider.models
        }
        cache = {} if self._cache is None else self._cache.stats()
        return {**self.statistics.summary(), "models": models, "cache": cache}

    def clear_cache(self) -> None:
        """Delete every cached vector in every tier.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        if self._cache is not None:
            self._cache.clear()

    def close(self) -> None:
        """End the calls under way and close cache and providers. A second call does nothing."""
        self._lifetime.close()
        self.readers.close()
        if self._cache is not None:
            self._cache.close()
        for provider in self._fallback.providers:
            provider.close()

    def _on_any(self, call: Call[R], until_s: float) -> Flow[tuple[GuardedProvider, R]]:
        """Return the result of the first provider that gives one. Each begins the call anew."""
        failures: dict[GuardedProvider, HalimedeError] = {}
        for provider in self._fallback.in_order():
            try:
                return provider, (yield from self._on(provider, call, until_s))
            except HalimedeError as error:
                if isinstance(error, InvalidInput) and provider is self._fallback.first:
                    raise
                self._lifetime.check()
                failures[provider] = error
                call.progress.restart()
        raise self._fallback.failed(failures)

    def _on(self, provider: GuardedProvider, call: Call[R], until_s: float) -> Flow[R]:
        """Return the result of one provider. It begins anew when the model changes."""
        cache = self._cache if provider.options.cache_enabled else None
        max_age_s = math.inf if cache is None else self._model_check_s
        for _ in range(MODEL_CHANGES):
            model = yield from provider.model(call.task.kind, until_s, max_age_s)
            try:
                call.task.check(provider.name, model)
                self._fallback.admit(provider, model)
            except (UnsupportedInput, SpaceRefused):
                provider.forget()
                raise
            dimensions = call.options.dimensions
            if dimensions is None and call.task.output == "vector":
                dimensions = provider.options.dimensions
            attempt = _Attempt(
                provider,
                model,
                call,
                dimensions,
                check_dimensions(dimensions, model),
                until_s,
                cache,
                self,
                [],
            )
            try:
                return (yield from attempt.result())
            except ModelChanged:
                provider.forget()
                call.progress.restart()
        raise ServerError(
            f"{provider.name} changed its model {MODEL_CHANGES} times during one call. Do its "
            "addresses serve the same model?"
        )


class _Attempt(NamedTuple, Generic[R]):
    """One call at one provider, while that has this model."""

    provider: GuardedProvider
    model: ServedModel
    call: Call[R]
    dimensions: int | None
    """As the provider is asked."""
    dims: int
    """Length of a vector."""
    until_s: float
    cache: Cache | None
    pipeline: Pipeline
    failed: list[int]
    """Indices of inputs that end the call."""

    def result(self) -> Flow[R]:
        """Return the result for the call's inputs.

        Raises:
            ModelChanged: the provider has another model now.
        """
        call, model = self.call, self.model
        step, in_flight = batching.WINDOWING[call.task.kind]
        count = len(call.inputs)
        errors: dict[int, HalimedeError] = {}
        if call.task.kind in TEXT_KINDS and 0 < count <= step:
            answer, cached = yield from self._window(range(count), call.inputs, call.may_block)
            indices = np.arange(call.first, call.first + count)
        else:
            windows = [range(start, min(start + step, count)) for start in range(0, count, step)]
            results = yield from together([self._read(rows) for rows in windows], in_flight)
            parts = [
                (rows, part)
                for rows, part in zip(windows, results, strict=True)
                if isinstance(part, _Part)
            ]
            answer, cached, indices = self._joined(parts)
            for rows, error in zip(windows, results, strict=True):
                if isinstance(error, HalimedeError):
                    errors[rows.start + call.first] = error
            if errors and call.options.errors == "raise":
                raise errors[min(errors)]
        facts = {
            "tokens": answer.tokens,
            "cached": cached,
            "indices": indices,
            "versions": answer.row_versions,
            "errors": errors,
            "model": model.name,
            "space": model.space,
            "precision": model.precision,
            "max_tokens": model.token_limit(call.options.input_type),
            "provider": model.provider,
        }
        return call.task.result(Answered(answer, model, self.dims, call.options, facts))

    def _joined(
        self, parts: Sequence[tuple[range, _Part]]
    ) -> tuple[Answer, np.ndarray, np.ndarray]:
        """Return what the parts hold together: answer, `cached` and `indices`; perhaps no row."""
        nothing = np.empty(0, np.int64)
        is_ragged = self.call.task.output in RAGGED
        empty = ragged([]) if is_ragged else np.empty((0, self.dims), np.float32)
        answers = [Answer(empty, np.empty(0, np.int32), self.model, None, nothing)]
        answers += [part.answer for _, part in parts]
        cached = [np.empty(0, np.bool_), *(part.cached for _, part in parts)]
        rows = [nothing, *(np.arange(rows.start, rows.stop) for rows, _ in parts)]
        return concatenate(answers), np.concatenate(cached), np.concatenate(rows) + self.call.first

    def _read(self, rows: range) -> Flow[_Part | HalimedeError | None]:
        """Return a window's entries, or what is wrong with the only image or pair in it.

        None if the call has failed already.
        """
        if self.failed:
            return None
        values = self.call.inputs[rows.start : rows.stop]
        if self.call.task.kind in TEXT_KINDS:
            return (yield from self._window(rows, values, False))
        index = rows.start + self.call.first
        read_options = ReadOptions(self.model.max_image_bytes, self.pipeline.fetch)
        yield from self.pipeline.images.enter()
        try:
            read = self.pipeline.readers.submit(values[0].read, read_options)  # type: ignore[union-attr]
            content = yield from result_of(read)
            return (yield from self._window(rows, [content], False))
        except ABOUT_ONE_INPUT as error:
            if error.index is None:  # while the input was read, its index was not known
                error = type(error)(f"{self.call.task.kind} {index}: {error}", index=index)
            if self.call.options.errors == "raise":
                self.failed.append(index)  # those under way may be before it
            self.call.progress.advance(1)
            return error
        finally:
            self.pipeline.images.leave()

    def _window(self, rows: range, contents: Sequence[Any], may_block: bool) -> Flow[_Part]:
        """Return the answer for some contents, from the cache or from the provider."""
        try:
            if self.cache is None:
                answer = yield from self._compute(contents, may_block)
                return _Part(answer, np.zeros(len(contents), np.bool_))
            return (yield from self._cached(self.cache, contents, may_block))
        except HalimedeError as error:
            if error.index is None:
                raise
            raise error.at(rows.start + self.call.first + error.index) from None

    def _cached(self, cache: Cache, contents: Sequence[Content], may_block: bool) -> Flow[_Part]:
        made_by: dict[bytes, int] = {}

        def compute(missing: Sequence[int]) -> Flow[Entries]:
            with reindexed(missing):
                answer = yield from self._compute([contents[row] for row in missing], may_block)
            versions = answer.row_versions.tolist()
            made_by.update(zip((keys[row] for row in missing), versions, strict=True))
            return Entries(answer.vectors, answer.tokens, answer.images)

        keys = cache_keys(
            contents,
            kind=self.call.task.kind,
            space=self.model.space,
            precision=self.model.precision,
            input_type=self.call.options.input_type,
            dims=self.dims,
            output=self.call.task.output,
        )
        dims = None if self.call.task.output in RAGGED else self.dims
        expect = Expect(dims, self.provider.options.cache_ttl_s)
        entries, cached = yield from cache.get_or_compute(keys, compute, expect)
        self.call.progress.advance(int(cached.sum()))
        versions = np.array([made_by.get(key, 0) for key in keys], np.int64)
        return _Part(
            Answer(entries.vectors, entries.tokens, self.model, entries.images, versions), cached
        )

    def _compute(self, contents: Sequence[Content], may_block: bool) -> Flow[Answer]:
        """Return the provider's answer for the contents, asked in requests."""
        if len(contents) == 1:
            return (yield from self._send(contents, may_block))
        requests = batching.plan_requests(
            contents, self.provider.max_texts(self.model), self.model.max_tokens
        )
        may_block &= len(requests) == 1

        def send(rows: list[int]) -> Flow[Answer]:
            with reindexed(rows):
                return (yield from self._send([contents[row] for row in rows], may_block))

        answers = yield from together(
            [send(rows) for rows in requests], batching.REQUESTS_IN_FLIGHT
        )
        order = np.argsort([row for rows in requests for row in rows])
        return concatenate(answers).select(order)

    def _send(self, contents: Sequence[Content], may_block: bool) -> Flow[Answer]:
        """Return the provider's answer to one request."""
        call = self.call
        request = Request(
            contents,
            call.task.kind,
            call.options.input_type,
            self.dimensions,
            call.options.sticky_key,
            self.model,
            may_block,
            call.task.output,
        )
        answer = yield from self.provider.embed(request, self.until_s)
        _check(answer, request, self.dims)
        self.call.progress.advance(len(contents))
        return answer


class _Part(NamedTuple):
    """The answer for some inputs of a call."""

    answer: Answer
    cached: np.ndarray
    """`[inputs]` bool: whether each vector came from the cache."""


def _check(answer: Answer, request: Request, dims: int) -> None:
    """Raise unless the answer is of the model asked, of the shape asked, and finite."""
    model, rows = request.model, len(request.inputs)
    assert model is not None
    if answer.model is not model and not answer.model.is_alike(model):
        raise ModelChanged(f"{model.name} was changed. Send again.")
    if request.output in RAGGED:
        _check_ragged(answer.vectors, request.output, model.name, rows)
        return
    if answer.vectors.shape != (rows, dims):
        raise ServerError(
            f"{model.name} was asked for {rows} × {dims}; it gave {answer.vectors.shape}."
        )
    if not math.isfinite(np.add.reduce(answer.vectors, axis=None)):  # the cheapest check of all
        check_finite(answer.vectors)


def _check_ragged(vectors: np.ndarray, output: OutputKind, name: str, rows: int) -> None:
    """Raise unless there is a finite matrix for each input; of `sparse`, one of two rows."""
    if vectors.shape != (rows,) or any(
        np.ndim(row) != 2 or (output == "sparse" and len(row) != 2) for row in vectors
    ):
        raise ServerError(
            f"{name} was asked for {output} outputs of {rows} inputs; it gave arrays of other "
            "shapes."
        )
    finite = [np.isfinite(row).all() for row in vectors]
    check_finite(np.where(finite, 0, np.nan)[:, None])
