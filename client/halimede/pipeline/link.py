"""One provider as a chain uses it: paced, retried, halved when memory runs out, watched."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import tenacity

from halimede.inputs.content import InputKind
from halimede.observability.statistics import Statistics
from halimede.pipeline.breaker import Breaker, Breakers, is_down
from halimede.providers import Answer, Options, Provider, Request, open_provider
from halimede.providers.base import concatenate, reindexed
from halimede.results import ServedModel
from halimede_ops.errors import (
    HalimedeError,
    ModelChanged,
    OutOfMemory,
    ServerError,
    ServerOverloaded,
)

T = TypeVar("T")
FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 2.0
UNHEALTHY_LATENCY_S = 5.0
"""A probe slower than this is unhealthy."""


class Deadline:
    """The moment a call must be done by."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._at = math.inf if seconds is None else time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left; infinity without a deadline, never less than zero."""
        return max(0.0, self._at - time.monotonic())


class _Heard(NamedTuple):
    """A model as a provider last told it."""

    model: ServedModel
    at: float
    """When, on the monotonic clock; minus infinity once it is forgotten."""

    @property
    def age_s(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.at


class Link:
    """A provider in a chain, with its options and its state."""

    def __init__(
        self, options: Options, statistics: Statistics, provider: Provider | None = None
    ) -> None:
        """A link that opens its provider on first use, unless one is given."""
        self.options = options
        self.name = provider.name if provider else f"{options.provider}:{options.model_id}"
        self.has_next = False
        """Whether another link follows in the chain."""
        self._breaker = Breaker(self.health)
        self._provider = provider
        self._opening = asyncio.Lock()
        self._statistics = statistics
        self._heard: dict[InputKind, _Heard] = {}
        self._own_kind: InputKind = "text"
        self._most_texts = options.batch_size
        self._free_at = 0.0

    @property
    def breaker(self) -> Breaker | Breakers:
        """The breaker around the provider: its own, where it watches its servers itself."""
        return getattr(self._provider, "breaker", self._breaker)

    @property
    def known(self) -> list[ServedModel]:
        """The models that were heard of, each as it was then."""
        return [heard.model for heard in self._heard.values()]

    def most_texts(self, model: ServedModel) -> int:
        """Most texts to put in one request."""
        return min(model.max_batch_size, self._most_texts or model.max_batch_size)

    async def model(
        self, kind: InputKind | None, deadline: Deadline, fresh_s: float
    ) -> ServedModel:
        """The model that embeds items of this kind, heard of at most `fresh_s` seconds ago; None:
        the one that the provider is named for.

        While the provider cannot be reached it is the model last heard of: what is cached of it
        stays right.
        """
        heard = self._heard.get(kind or self._own_kind)
        if heard is not None and (heard.age_s < fresh_s or self.breaker.is_open):
            return heard.model
        try:
            model = await self._retried(
                lambda: self._describe(self._timeout_s(deadline), kind), deadline
            )
        except ServerError:
            if heard is None:
                raise
            return heard.model
        if kind is None:
            self._own_kind = model.input
        self._hear(kind or model.input, model)
        return model

    def forget(self) -> None:
        """Describe every model anew next time."""
        for kind, heard in self._heard.items():
            self._heard[kind] = heard._replace(at=-math.inf)

    async def embed(self, request: Request, deadline: Deadline) -> Answer:
        """The answer to one request, in halves when memory runs out.

        Raises:
            HalimedeError: the provider's own error after the last retry.
        """
        count = len(request.inputs)
        middle = count // 2
        if self._most_texts is None or count <= self._most_texts:
            try:
                answer = await self._retried(lambda: self._ask(request, deadline), deadline)
            except OutOfMemory:
                if count == 1:
                    raise
                self._most_texts = middle
            else:
                self._hear_again(request.kind, answer.model)
                return answer
        halves = []
        for half in (slice(middle), slice(middle, None)):
            with reindexed(range(count)[half]):
                halves.append(await self.embed(request.select(half), deadline))
        return _whole(*halves)

    async def health(self, timeout_s: float) -> None:
        """Nothing when the provider can embed now."""
        await (await self.provider()).health(timeout_s)

    async def report(self) -> dict[str, Any]:
        """Whether the provider embeds a probe text, how fast, and what it is."""
        told: dict[str, Any] = {"provider": self.name, "model": self.options.model_id}
        if hasattr(self.options, "url"):
            told["url"] = self.options.url
        try:
            model = await self._describe(self.options.timeout_s)  # also connects
            began = time.perf_counter()
            await self.health(self.options.timeout_s)
            latency_s = time.perf_counter() - began
        except HalimedeError as error:
            return {**told, "healthy": False, "error": str(error)}
        return {
            **told,
            "healthy": latency_s <= UNHEALTHY_LATENCY_S,
            "latency_ms": round(latency_s * 1000, 2),
            "precision": model.precision,
            "space": model.space,
        }

    async def provider(self) -> Provider:
        """The provider, opened once; in a thread, since its packages may be slow to import."""
        async with self._opening:
            if self._provider is None:
                self._provider = await asyncio.to_thread(open_provider, self.options)
            return self._provider

    async def close(self) -> None:
        """Stop probing and close the provider."""
        await self.breaker.close()
        if self._provider is not None:
            await self._provider.close()

    async def _describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        return await (await self.provider()).describe(timeout_s, kind)

    async def _ask(self, request: Request, deadline: Deadline) -> Answer:
        await self._turn(deadline)
        count = len(request.inputs)
        self._statistics.requested(self.name, request.kind, count)
        provider = await self.provider()
        try:
            return await provider.embed(request, self._timeout_s(deadline))
        except MemoryError:
            raise OutOfMemory(f"{self.name} has no memory for {count} {request.kind}s.") from None

    async def _retried(self, ask: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
        """What `ask` returns; again after a pause where that can help and time is left."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            # With another link to turn to, one that is known to be down has its turn once.
            stop=lambda state: (
                state.attempt_number > self.options.retries
                or (self.has_next and self.breaker.is_open)
                or state.upcoming_sleep >= deadline.left_s()
            ),
            wait=tenacity.wait_random_exponential(FIRST_RETRY_S, LONGEST_RETRY_S),
            sleep=asyncio.sleep,
            reraise=True,
        )
        return await retrying(self._watched, ask)

    async def _watched(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` returns; breaker and statistics hear how it went."""
        try:
            answer = await ask()
        except HalimedeError as error:
            self._statistics.failed(self.name, type(error).__name__)
            if is_down(error):
                self.breaker.failed()
            raise
        self.breaker.succeeded()
        return answer

    async def _turn(self, deadline: Deadline) -> None:
        """Wait for this request's turn under the rate limit."""
        if self.options.requests_per_s is None:
            return
        now = time.monotonic()
        turn = max(now, self._free_at)
        if turn - now > deadline.left_s():
            raise ServerOverloaded(
                f"{self.name} is limited to {self.options.requests_per_s:g} requests/s; this one "
                "would have its turn after the deadline."
            )
        self._free_at = turn + 1 / self.options.requests_per_s
        await asyncio.sleep(turn - now)

    def _timeout_s(self, deadline: Deadline) -> float:
        return min(self.options.timeout_s, max(deadline.left_s(), 0.001))

    def _hear(self, kind: InputKind, model: ServedModel) -> None:
        heard = self._heard.get(kind)
        if heard is not None and not heard.model.is_alike(model):
            self._statistics.model_changed(self.name)
        self._heard[kind] = _Heard(model, time.monotonic())

    def _hear_again(self, kind: InputKind, model: ServedModel) -> None:
        """An answer's model is as it was told: it has just been heard of."""
        heard = self._heard.get(kind)
        if heard is not None and heard.model.is_alike(model):
            self._heard[kind] = heard._replace(at=time.monotonic())


def _may_pass(error: BaseException) -> bool:
    """Whether the same request can succeed on another try."""
    if isinstance(error, (OutOfMemory, ModelChanged)):
        return False  # another request can
    return isinstance(error, HalimedeError) and error.retryable


def _whole(first: Answer, second: Answer) -> Answer:
    if not first.model.is_alike(second.model):
        raise ModelChanged("the model was changed between two halves of a request. Send again.")
    return concatenate([first, second])
