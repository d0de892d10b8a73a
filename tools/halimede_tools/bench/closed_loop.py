"""Closed-loop load: so many callers, each of which sends its next request when it has an answer.

This module imports nothing but the standard library: the peers' processes load it too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

Request = TypeVar("Request")


@dataclasses.dataclass
class Load:
    """What came of a load. A subclass may look at every answer: see `answered` and `failed`."""

    requests: int = 0
    seconds: float = 0.0
    """From the first request to the last answer."""
    latencies_s: list[float] = dataclasses.field(default_factory=list)
    """Of the requests that were answered."""
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    """How often each error came, by its name."""
    first_error: BaseException | None = None

    @property
    def per_s(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    def answered(self, request: Any, answer: Any, latency_s: float) -> None:
        """Count one answer."""
        self.latencies_s.append(latency_s)

    def failed(self, request: Any, error: BaseException) -> None:
        """Count one error."""
        self.errors[error_name(error)] += 1
        self.first_error = self.first_error or error

    def raise_errors(self) -> None:
        """Raise the first error, unless every request was answered."""
        if self.first_error is not None:
            counts = ", ".join(f"{name} {count}" for name, count in self.errors.items())
            failed = f"{self.errors.total()} of {self.requests} requests failed: {counts}"
            self.first_error.add_note(failed)
            raise self.first_error


class Future(Protocol):
    """An answer on its way: of gRPC or of `concurrent.futures`."""

    def add_done_callback(self, call: Callable[[Any], None], /) -> object:
        """Have `call` called with this future when it is done."""

    def exception(self) -> BaseException | None:
        """Its error."""

    def result(self) -> Any:
        """Its answer."""


def threads(
    send: Callable[[Request], object],
    requests: Iterable[Request],
    callers: int,
    load: Load | None = None,
) -> Load:
    """Send with a blocking function, from a thread each; one caller is the calling thread."""
    load = load or Load()

    def timed(request: Request) -> tuple[Request, object, Exception | None, float]:
        began = time.perf_counter()
        try:
            return request, send(request), None, time.perf_counter() - began
        except Exception as error:
            return request, None, error, 0.0

    with ThreadPoolExecutor(callers) as pool:
        began = time.perf_counter()
        for request, answer, error, latency_s in (map if callers == 1 else pool.map)(
            timed, requests
        ):
            load.requests += 1
            if error is None:
                load.answered(request, answer, latency_s)
            else:
                load.failed(request, error)
        load.seconds = time.perf_counter() - began
    return load


def futures(
    start: Callable[[Request], Future],
    requests: Iterable[Request],
    callers: int,
    load: Load | None = None,
) -> Load:
    """Send with a function that returns a future. An answer sends the next request, in the thread
    that brings it: this takes the least CPU from a server on the same cores.
    """
    load = load or Load()
    waiting = iter(requests)
    lock, ended = threading.Lock(), threading.Semaphore(0)

    def send_next() -> None:
        try:
            with lock:
                request = next(waiting)
                load.requests += 1
        except StopIteration:
            ended.release()
            return
        began = time.perf_counter()
        start(request).add_done_callback(lambda future: receive(request, future, began))

    def receive(request: Request, future: Future, began: float) -> None:
        error = future.exception()
        if error is None:
            load.answered(request, future.result(), time.perf_counter() - began)
        else:
            load.failed(request, error)
        send_next()

    began = time.perf_counter()
    for _ in range(callers):
        send_next()
    for _ in range(callers):
        ended.acquire()
    load.seconds = time.perf_counter() - began
    return load


async def coroutines(
    send: Callable[[Request], Awaitable[object]],
    requests: Iterable[Request],
    callers: int,
    load: Load | None = None,
) -> Load:
    """Send with a coroutine function, on the running event loop."""
    load = load or Load()
    waiting = iter(requests)

    async def caller() -> None:
        for request in waiting:
            load.requests += 1
            began = time.perf_counter()
            try:
                answer = await send(request)
            except Exception as error:
                load.failed(request, error)
            else:
                load.answered(request, answer, time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    load.seconds = time.perf_counter() - began
    return load


def error_name(error: BaseException) -> str:
    """GRPC's status code of an error, else the name of its class."""
    code = getattr(error, "code", None)
    return str(code().name) if callable(code) else type(error).__name__
