"""One provider of a fallback: paced, retried, split when memory runs out, watched by a breaker."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from halimede.inputs.content import InputKind, plural
from halimede.observability.statistics import Statistics
from halimede.pipeline import canary
from halimede.pipeline.circuit_breaker import PROBE_TIMEOUT_S, CircuitBreaker, is_down
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import Gate, Lifetime, SharedRead
from halimede.pipeline.waiting import Flow, Future, drive, pause, result_of, shared_result
from halimede.providers import open_providers
from halimede.providers.base import Answer, Options, Provider, Request, concatenate, reindexed
from halimede.providers.http_errors import timed_out
from halimede.providers.probe import PROBES
from halimede.results import ServedModel
from halimede_ops.errors import (
    DeadlineExceeded,
    HalimedeError,
    ModelChanged,
    OutOfMemory,
    ServerError,
    ServerOverloaded,
    ServerUnreachable,
)

T = TypeVar("T")
FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 2.0
UNHEALTHY_LATENCY_S = 5.0
"""A probe slower than this is unhealthy."""
FULL_REQUESTS = 8
"""Answered requests of the largest size allowed, after which that size is doubled again."""


@dataclasses.dataclass
class _Described:
    """A model as a provider last described it."""

    model: ServedModel
    read_s: float
    """When the last read began, on the clock `time.monotonic`."""
    confirmed_s: float
    """When a read or an answer last showed this model. Minus infinity: it may be another now."""


class Replica:
    """One provider object: for Triton, one of the servers that share a model's load."""

    def __init__(self, provider: Provider, options: Options, on_change: Callable[[], None]) -> None:
        self.breaker = CircuitBreaker(lambda timeout_s: drive(self.probe(timeout_s)))
        self.in_flight: set[object] = set()
        """One token for each request under way. Sets are changed without a lock."""
        self._provider = provider
        self._options = options
        self._on_change = on_change
        self._refresh_s = options.refresh_s
        self._described: dict[InputKind, _Described] = {}
        self._reads: dict[InputKind | None, SharedRead[ServedModel]] = {}
        self._own_kind: InputKind = "text"

    def known(self, kind: InputKind | None) -> _Described | None:
        """Return the model for a kind as it was last described."""
        return self._described.get(kind or self._own_kind)

    def models(self) -> list[ServedModel]:
        """Return every model that was described."""
        return [described.model for described in list(self._described.values())]

    def forget(self) -> None:
        """Describe every model again before its next use."""
        for described in list(self._described.values()):
            described.confirmed_s = -math.inf

    def describe(
        self, kind: InputKind | None, until_s: float, *, fresh: bool = False
    ) -> Flow[ServedModel]:
        """Read the model for a kind. Concurrent calls share a read, and none can end it."""
        read = self._read(kind, fresh=fresh)
        return (yield from self._limited(shared_result, read, self._timeout_s(until_s)))

    def embed(self, request: Request, until_s: float) -> Flow[Answer]:
        """Return the answer of the model, or of its canary, as last described."""
        described = self.known(request.kind)
        if described is None or described.confirmed_s == -math.inf:
            model = yield from self.describe(request.kind, until_s)
        else:
            model = described.model
            if time.monotonic() - described.read_s >= self._refresh_s:
                described.read_s = time.monotonic()
                self._read(request.kind)  # beside the calls
        if model.candidate is None:
            answer = yield from self.ask(request, model, until_s)
        else:
            answer = yield from canary.split(
                request, model, lambda part, asked: self.ask(part, asked, until_s)
            )
        return answer

    def ask(self, request: Request, model: ServedModel, until_s: float) -> Flow[Answer]:
        """Return the answer of exactly this model.

        Raises:
            ModelChanged: another model has its name now.
        """
        timeout_s = self._timeout_s(until_s)
        try:
            if request.model is not model:
                request = request._replace(model=model)
            future = self._provider.embed(request, timeout_s)
            # A future that is done needs no flow, which costs as much as the rest of this function.
            answer = (
                future.result()
                if future.done()
                else (yield from self._limited(result_of, future, timeout_s))
            )
            if not answer.is_proven:
                again = yield from self.describe(request.kind, until_s, fresh=True)
                if again != model:
                    raise ModelChanged(f"{self._provider.name} changed its model. Send again.")
            self._confirm(request.kind, answer.model)
        except ModelChanged:
            self.forget()
            raise
        except CancelledError:
            raise ServerUnreachable(f"{self._provider.name} was closed.") from None
        except MemoryError:
            count = len(request.inputs)
            raise OutOfMemory(
                f"{self._provider.name} has no memory for {count} {plural(request.kind)}."
            ) from None
        return answer

    def probe(self, timeout_s: float) -> Flow[None]:
        """Raise unless a probe is answered."""
        until_s = time.monotonic() + timeout_s
        model = yield from self.describe(None, until_s, fresh=True)
        request = Request([PROBES[model.input]], model.input, output=model.outputs[0])
        yield from self.ask(request, model, until_s)

    def close(self) -> None:
        """Stop probing and close the provider."""
        self.breaker.close()
        self._provider.close()

    def _read(self, kind: InputKind | None, *, fresh: bool = False) -> Future[ServedModel]:
        read = self._reads.get(kind)
        if read is None:
            read = self._reads.setdefault(kind, SharedRead(lambda: self._start_read(kind)))
        return read.read(fresh=fresh)

    def _start_read(self, kind: InputKind | None) -> Future[ServedModel]:
        future = self._provider.describe(self._options.timeout_s, kind)
        future.add_done_callback(lambda done: self._store(kind, done))
        return future

    def _store(self, kind: InputKind | None, read: Future[ServedModel]) -> None:
        try:
            model = read.result()
        except Exception:  # those who wait for the read get it
            return
        if kind is None:
            self._own_kind = model.input
        known = self._described.get(kind or model.input)
        if known is not None and not known.model.is_alike(model):
            self._on_change()
        now_s = time.monotonic()
        self._described[kind or model.input] = _Described(model, now_s, now_s)

    def _confirm(self, kind: InputKind, model: ServedModel) -> None:
        described = self._described.get(kind)
        if described is not None and (described.model is model or described.model.is_alike(model)):
            described.confirmed_s = time.monotonic()

    def _timeout_s(self, until_s: float) -> float:
        if until_s == math.inf:
            return self._options.timeout_s
        return min(self._options.timeout_s, max(until_s - time.monotonic(), 0.001))

    def _limited(
        self, wait_for: Callable[[Future[T], float], Flow[T]], future: Future[T], timeout_s: float
    ) -> Flow[T]:
        """Return what `result_of` or `shared_result` returns within the time limit."""
        try:
            return (yield from wait_for(future, time.monotonic() + timeout_s))
        except TimeoutError:
            raise timed_out(self._provider.name, timeout_s) from None
        except CancelledError:
            raise ServerUnreachable(f"{self._provider.name} was closed.") from None


class GuardedProvider:
    """A provider with its options and its state. It is opened by the first call that needs it."""

    def __init__(
        self,
        options: Options,
        statistics: Statistics,
        lifetime: Lifetime,
        provider: Provider | None = None,
    ) -> None:
        """Guard a provider: this one, or the one that the options describe."""
        self.options = options
        self.name = provider.name if provider else f"{options.provider}:{options.model_id}"
        self.has_next = False
        """Whether another provider follows in the fallback."""
        self._statistics = statistics
        self._lifetime = lifetime
        self._pool = Pool(1, "open")
        self._opening = SharedRead(lambda: self._pool.submit(self._open))
        self._replicas = [self._replica(provider)] if provider else []
        self._turn = itertools.count()
        self._max_texts = options.batch_size
        """Maximum texts in one request, after memory ran out perhaps fewer than configured."""
        self._full_requests = 0
        self._pace = Gate(1)
        self._free_s = 0.0

    @property
    def is_down(self) -> bool:
        """Whether requests should go elsewhere: the breaker of every replica is open."""
        return bool(self._replicas) and all(replica.breaker.is_open for replica in self._replicas)

    @property
    def models(self) -> list[ServedModel]:
        """The models that were described, each as it was then."""
        return [model for replica in self._replicas for model in replica.models()]

    def max_texts(self, model: ServedModel) -> int:
        """Return the maximum number of texts in one request."""
        return min(model.max_batch_size, self._max_texts or model.max_batch_size)

    def model(self, kind: InputKind | None, until_s: float, max_age_s: float) -> Flow[ServedModel]:
        """Return the model for inputs of this kind, described at most `max_age_s` ago.

        None asks for the configured model. While the provider cannot be reached it is the model
        last described: what is cached of it stays right.
        """
        newest: _Described | None = None
        for replica in self._replicas:
            known = replica.known(kind)
            if known and (newest is None or known.confirmed_s > newest.confirmed_s):
                newest = known
        if newest is not None and (
            time.monotonic() - newest.confirmed_s < max_age_s or self.is_down
        ):
            return newest.model
        try:
            return (
                yield from self._retried(lambda replica: replica.describe(kind, until_s), until_s)
            )
        except ServerError:
            if newest is None:
                raise
            return newest.model

    def forget(self) -> None:
        """Describe every model again before its next use."""
        for replica in self._replicas:
            replica.forget()

    def embed(self, request: Request, until_s: float) -> Flow[Answer]:
        """Return the answer to one request, in halves when memory runs out.

        Raises:
            HalimedeError: the provider's own error after the last retry.
        """
        count = len(request.inputs)
        if self._max_texts is None or count <= self._max_texts:
            try:
                answer = yield from self._retried(
                    lambda replica: replica.embed(request, until_s), until_s, request
                )
            except OutOfMemory:
                if count == 1:
                    raise
                self._max_texts, self._full_requests = count // 2, 0
            else:
                self._allow_more(count)
                return answer
        halves = []
        for half in (slice(count // 2), slice(count // 2, None)):
            with reindexed(range(count)[half]):
                halves.append((yield from self.embed(request.select(half), until_s)))
        if not halves[0].model.is_alike(halves[1].model):
            raise ModelChanged("the model was changed between two halves of a request. Send again.")
        return concatenate(halves)

    def report(self) -> Flow[dict[str, Any]]:
        """Report whether the provider embeds a probe, how fast, and its model."""
        facts: dict[str, Any] = {"provider": self.name, "model": self.options.model_id}
        if hasattr(self.options, "url"):
            facts["url"] = self.options.url
        timeout_s = self.options.timeout_s
        until_s = time.monotonic() + 2 * timeout_s
        try:
            model = yield from self._on_any(  # also connects
                lambda replica: replica.describe(None, until_s, fresh=True), until_s
            )
            began_s = time.perf_counter()
            yield from self._on_any(lambda replica: replica.probe(timeout_s), until_s)
            latency_s = time.perf_counter() - began_s
        except HalimedeError as error:
            return {**facts, "healthy": False, "error": str(error)}
        return {
            **facts,
            "healthy": latency_s <= UNHEALTHY_LATENCY_S,
            "latency_ms": round(latency_s * 1000, 2),
            "precision": model.precision,
            "space": model.space,
        }

    def close(self) -> None:
        """Stop probing and close the provider."""
        self._pool.close()
        for replica in self._replicas:
            replica.close()

    def _open(self) -> None:
        """Open the provider. Its packages may be slow to import."""
        if not self._replicas:
            self._replicas = [self._replica(one) for one in open_providers(self.options)]
        if self._lifetime.is_closed:
            self.close()

    def _replica(self, provider: Provider) -> Replica:
        return Replica(provider, self.options, lambda: self._statistics.model_changed(self.name))

    def _on_any(self, ask: Callable[[Replica], Flow[T]], until_s: float) -> Flow[T]:
        """Return the answer of the least busy replica that can be reached."""
        if not self._replicas:
            try:
                yield from shared_result(self._opening.read(), until_s)
            except TimeoutError:
                raise timed_out(self.name, self.options.timeout_s) from None
        replicas = self._by_load()
        for replica in replicas:
            began_s = time.monotonic()
            replica.in_flight.add(token := object())
            try:
                answer = yield from ask(replica)
            except HalimedeError as error:
                if self._is_down(error, time.monotonic() - began_s):
                    replica.breaker.record_failure()
                if not isinstance(error, ServerUnreachable) or replica is replicas[-1]:
                    raise
            else:
                replica.breaker.record_success()
                return answer
            finally:
                replica.in_flight.discard(token)
        raise AssertionError

    def _is_down(self, error: HalimedeError, seconds: float) -> bool:
        """Whether an error after some seconds says that the server is down."""
        if isinstance(error, DeadlineExceeded):
            # After less time it says more of the caller's deadline than of the server.
            return seconds >= min(self.options.timeout_s, PROBE_TIMEOUT_S)
        return is_down(error) and not self._lifetime.is_closed

    def _by_load(self) -> Sequence[Replica]:
        """Replicas in the order to try them: by open breaker, then by requests in flight."""
        if len(self._replicas) == 1:
            return self._replicas
        first = next(self._turn) % len(self._replicas)
        rotated = self._replicas[first:] + self._replicas[:first]
        return sorted(rotated, key=lambda one: (one.breaker.is_open, len(one.in_flight)))

    def _retried(
        self,
        ask: Callable[[Replica], Flow[T]],
        until_s: float,
        request: Request | None = None,
    ) -> Flow[T]:
        """Return a replica's answer, asked again after a pause where that can help.

        tenacity would sleep itself; a flow has to yield its pauses.
        """
        for attempt in itertools.count(1):
            try:
                if request is not None:
                    if self.options.requests_per_s is not None:
                        yield from self._take_turn(1 / self.options.requests_per_s, until_s)
                    self._statistics.requested(self.name, request.kind, len(request.inputs))
                return (yield from self._on_any(ask, until_s))
            except HalimedeError as error:
                self._lifetime.check()
                self._statistics.failed(self.name, type(error).__name__)
                longest_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**attempt)
                pause_s = max(random.uniform(0, longest_s), error.retry_after_s or 0)
                if (
                    not error.retryable
                    or isinstance(error, (OutOfMemory, ModelChanged))  # another request can pass
                    or attempt > self.options.retries
                    # A provider that is known to be down gets one attempt if another follows.
                    or (self.has_next and self.is_down)
                    or pause_s > self.options.timeout_s
                    or time.monotonic() + pause_s >= until_s
                ):
                    raise
            yield from pause(time.monotonic() + pause_s)
        raise AssertionError

    def _take_turn(self, period_s: float, until_s: float) -> Flow[None]:
        """Wait for a request's turn under the rate limit."""
        turn_s = max(time.monotonic(), self._free_s) + len(self._pace) * period_s
        if turn_s > until_s:
            raise ServerOverloaded(
                f"{self.name} is limited to {1 / period_s:g} requests/s; this one would have its "
                "turn after the deadline."
            )
        yield from self._pace.enter()
        try:
            yield from pause(self._free_s)
            self._free_s = time.monotonic() + period_s
        finally:
            self._pace.leave()

    def _allow_more(self, count: int) -> None:
        """After enough full requests, double the size to which memory had limited them."""
        limit = self._max_texts
        if limit == self.options.batch_size or limit is None or count < limit:
            return
        self._full_requests += 1
        if self._full_requests >= FULL_REQUESTS:
            doubled, most = 2 * limit, self.options.batch_size
            models = self.models
            largest = most or max((model.max_batch_size for model in models), default=doubled)
            self._max_texts = most if doubled >= largest else doubled
            self._full_requests = 0
