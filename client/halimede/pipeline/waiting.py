"""Flows, and the two drivers that run them.

A flow is a generator that yields a `Wait` whenever it needs something that is not there yet. It
starts no thread, never sleeps and knows no event loop. `drive` runs a flow in the caller's thread,
`drive_async` on the caller's event loop. A driver that is interrupted closes its flow, and a flow
that is closed cancels what it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Future(Protocol[T_co]):
    """The part of `concurrent.futures.Future` that a flow needs. gRPC's futures have it too."""

    def done(self) -> bool:
        """Whether there is a result or an error."""
        ...

    def result(self, timeout: float | None = None) -> T_co:
        """Return the result, or raise the error."""
        ...

    def cancel(self) -> object:
        """End the work, if it can be ended."""
        ...

    def add_done_callback(self, fn: Callable[[Any], object], /) -> object:
        """Call `fn` once there is a result or an error, perhaps in another thread."""
        ...


class Wait(NamedTuple):
    """A flow yields this. It goes on when one of the futures is done, or at `until_s`."""

    futures: Sequence[Future[Any]] = ()
    until_s: float = math.inf
    """On the clock `time.monotonic`."""

    def is_over(self) -> bool:
        """Whether the flow can go on."""
        return any(future.done() for future in self.futures) or time.monotonic() >= self.until_s

    def left_s(self) -> float | None:
        """Seconds until `until_s`, at least 0. None: there is no such moment."""
        return None if self.until_s == math.inf else max(0.0, self.until_s - time.monotonic())


Flow = Generator[Wait, None, T]


def drive(flow: Flow[T]) -> T:
    """Return what a flow returns. The caller's thread waits."""
    try:
        while True:
            wait = next(flow)
            woken = threading.Event()
            for future in wait.futures:
                future.add_done_callback(_wakes(woken))
            woken.wait(wait.left_s())
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()


def _wakes(woken: threading.Event) -> Callable[[object], None]:
    return lambda _: woken.set()


async def drive_async(flow: Flow[T]) -> T:
    """Return what a flow returns. The caller's event loop goes on while it waits."""
    try:
        while True:
            await _wait(next(flow))
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()


async def _wait(wait: Wait) -> None:
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()

    def wake(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(woken.set)

    for future in wait.futures:
        future.add_done_callback(wake)
    left_s = wait.left_s()
    timer = None if left_s is None else loop.call_later(left_s, woken.set)
    try:
        await woken.wait()
    finally:
        if timer is not None:
            timer.cancel()


def pause(until_s: float) -> Flow[None]:
    """Wait until a moment on the clock `time.monotonic`."""
    while time.monotonic() < until_s:
        yield Wait((), until_s)


def result_of(future: Future[T], until_s: float = math.inf) -> Flow[T]:
    """Return a future's result. The future is cancelled if the flow gives up.

    Raises:
        TimeoutError: it is not done by then.
        Exception: the future's own error.
    """
    try:
        return (yield from shared_result(future, until_s))
    finally:
        if not future.done():
            future.cancel()


def shared_result(future: Future[T], until_s: float = math.inf) -> Flow[T]:
    """Return the result of a future that others wait for too, and that is never cancelled.

    Raises:
        TimeoutError: it is not done by then.
        Exception: the future's own error.
    """
    while not future.done():
        if time.monotonic() >= until_s:
            raise TimeoutError
        yield Wait((future,), until_s)
    return future.result()


def together(flows: Iterable[Flow[T]], most: int) -> Flow[list[T]]:
    """Return what the flows return, in their order. At most `most` of them run at once.

    If one fails, the others are closed.
    """
    queue = deque(enumerate(flows))
    if len(queue) == 1:
        return [(yield from queue[0][1])]
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Flow[T], Wait]] = {}

    def advance(index: int, flow: Flow[T]) -> None:
        waiting.pop(index, None)
        try:
            waiting[index] = flow, next(flow)
        except StopIteration as stop:
            results[index] = stop.value

    try:
        while queue or waiting:
            while queue and len(waiting) < most:
                advance(*queue.popleft())
            if waiting:
                waits = [wait for _, wait in waiting.values()]
                futures = [future for wait in waits for future in wait.futures]
                yield Wait(futures, min(wait.until_s for wait in waits))
            for index in sorted(waiting):
                flow, wait = waiting[index]
                if wait.is_over():
                    advance(index, flow)
    finally:
        for flow, _ in waiting.values():
            flow.close()
    return [results[index] for index in sorted(results)]
