"""One provider as a chain uses it: paced, retried, halved when memory runs out, watched."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tenacity

from halimede.breaker import Breaker
from halimede.providers import Answer, Options, Provider, open_provider
from halimede.results import ServedModel
from halimede.statistics import Statistics
from halimede_ops.errors import (
    DeadlineExceeded,
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
        self.breaker = Breaker(self.health)
        self._provider = provider
        self._opening = asyncio.Lock()
        self._statistics = statistics
        self._model: ServedModel | None = None
        self._known_at: float | None = None
        self._most_texts = options.batch_size
        self._free_at = 0.0

    @property
    def known(self) -> ServedModel | None:
        """The model as it was when last heard of; None: never."""
        return self._model

    def most_texts(self, model: ServedModel) -> int:
        """Most texts to put in one request."""
        return min(model.max_batch_size, self._most_texts or model.max_batch_size)

    async def model(self, deadline: Deadline, fresh_s: float) -> ServedModel:
        """The model, heard of at most `fresh_s` seconds ago.

        While the provider cannot be reached it is the model last heard of: what is cached of it
        stays right.
        """
        if self._model is not None and self._age_s() < fresh_s:
            return self._model
        if self._model is not None and self.breaker.is_open:
            return self._model
        try:
            model = await self._retried(lambda: self._describe(self._timeout_s(deadline)), deadline)
        except ServerError:
            if self._model is None:
                raise
            return self._model
        self._hear(model)
        return model

    def forget(self) -> None:
        """Describe the model anew next time."""
        self._known_at = None

    async def embed(
        self,
        texts: Sequence[bytes],
        input_type: str | None,
        dimensions: int | None,
        deadline: Deadline,
    ) -> Answer:
        """The answer to one request, in halves when memory runs out.

        Raises:
            HalimedeError: the provider's own error after the last retry.
        """
        middle = len(texts) // 2
        if self._most_texts is None or len(texts) <= self._most_texts:
            try:
                answer = await self._retried(
                    lambda: self._ask(texts, input_type, dimensions, deadline), deadline
                )
            except OutOfMemory:
                if len(texts) == 1:
                    raise
                self._most_texts = middle
            else:
                if self._model is not None and answer.model.is_alike(self._model):
                    self._known_at = time.monotonic()
                return answer
        halves = [
            await self.embed(half, input_type, dimensions, deadline)
            for half in (texts[:middle], texts[middle:])
        ]
        return _joined(*halves)

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

    async def _describe(self, timeout_s: float) -> ServedModel:
        return await (await self.provider()).describe(timeout_s)

    async def _ask(
        self,
        texts: Sequence[bytes],
        input_type: str | None,
        dimensions: int | None,
        deadline: Deadline,
    ) -> Answer:
        await self._turn(deadline)
        self._statistics.requested(self.name, len(texts))
        provider = await self.provider()
        try:
            return await provider.embed(texts, input_type, dimensions, self._timeout_s(deadline))
        except MemoryError:
            raise OutOfMemory(f"{self.name} has no memory for {len(texts)} texts.") from None

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
            if _is_down(error):
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

    def _age_s(self) -> float:
        """Seconds since the model was heard of; never less than a limit once it is forgotten."""
        return math.inf if self._known_at is None else time.monotonic() - self._known_at

    def _timeout_s(self, deadline: Deadline) -> float:
        return min(self.options.timeout_s, max(deadline.left_s(), 0.001))

    def _hear(self, model: ServedModel) -> None:
        if self._model is not None and not self._model.is_alike(model):
            self._statistics.model_changed(self.name)
        self._model = model
        self._known_at = time.monotonic()


def _may_pass(error: BaseException) -> bool:
    """Whether the same request can succeed on another try."""
    if isinstance(error, (OutOfMemory, ModelChanged)):
        return False  # another request can
    return isinstance(error, HalimedeError) and error.retryable


def _is_down(error: HalimedeError) -> bool:
    """Whether an error says that the provider, not the request, is at fault."""
    if isinstance(error, DeadlineExceeded):
        return True
    return isinstance(error, ServerError) and not isinstance(
        error, (OutOfMemory, ModelChanged, ServerOverloaded)
    )


def _joined(first: Answer, second: Answer) -> Answer:
    if not first.model.is_alike(second.model):
        raise ModelChanged("the model was changed between two halves of a request. Send again.")
    return Answer(
        np.concatenate([first.vectors, second.vectors]),
        np.concatenate([first.tokens, second.tokens]),
        first.model,
    )
