"""Pieces that concurrent calls share: futures, coalesced reads, a gate, a lifetime."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, Generic, TypeVar

from halimede.pipeline.waiting import Flow, Future, Wait, shared_result
from halimede_ops.errors import HalimedeError

T = TypeVar("T")


class Completed(Generic[T]):
    """A future that has its result. `concurrent.futures.Future` costs ten times as much."""

    def __init__(self, value: T) -> None:
        self._value = value

    def done(self) -> bool:
        """Return True."""
        return True

    def result(self, timeout: float | None = None) -> T:
        """Return the result."""
        return self._value

    def cancel(self) -> bool:
        """Return False: it is too late."""
        return False

    def add_done_callback(self, fn: Callable[[Any], object], /) -> object:
        """Call `fn` now."""
        return fn(self)


def completed(value: T) -> Future[T]:
    """Return a future that has this result."""
    return Completed(value)


class Mapped(Generic[T]):
    """A future whose result is computed from another's, in the thread that asks for it."""

    def __init__(self, future: Future[Any], compute: Callable[[Future[Any]], T]) -> None:
        """`compute` gets the other future when that is done. It returns or raises."""
        self._future = future
        self._compute = compute

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the error."""
        return self._compute(self._future)

    def cancel(self) -> object:
        """End the work, if it can be ended."""
        return self._future.cancel()

    def add_done_callback(self, fn: Callable[[Any], object], /) -> object:
        """Call `fn` with this future once there is a result or an error."""
        compute = self._compute  # without a cycle through this object
        return self._future.add_done_callback(lambda done: fn(Mapped(done, compute)))


class SharedRead(Generic[T]):
    """Coalesces concurrent reads of one value. A read goes on when its caller gives up."""

    def __init__(self, start: Callable[[], Future[T]]) -> None:
        """`start` begins a read."""
        self._start = start
        self._lock = threading.Lock()
        self._current: ConcurrentFuture[T] | None = None
        self._next: ConcurrentFuture[T] | None = None

    def read(self, *, fresh: bool = False) -> ConcurrentFuture[T]:
        """Return the future of a read under way, or of a new one.

        With `fresh`, the read begins after this call.
        """
        with self._lock:
            if self._current is not None:
                if not fresh:
                    return self._current
                if self._next is None:
                    self._next = ConcurrentFuture()
                return self._next
            future: ConcurrentFuture[T] = ConcurrentFuture()
            self._current = future
        self._begin(future)
        return future

    def _begin(self, future: ConcurrentFuture[T]) -> None:
        try:
            started = self._start()
        except Exception as error:
            self._finish(future, error, None)
            return

        def finish(done: Future[T]) -> None:
            try:
                result = done.result()
            except BaseException as error:
                self._finish(future, error, None)
            else:
                self._finish(future, None, result)

        started.add_done_callback(finish)

    def _finish(
        self, future: ConcurrentFuture[T], error: BaseException | None, result: Any
    ) -> None:
        with self._lock:
            self._current, self._next = self._next, None
            following = self._current
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
        if following is not None:
            self._begin(following)


class Gate:
    """Lets at most `most` flows through at once, in the order in which they came."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._lock = threading.Lock()
        self._queue: deque[ConcurrentFuture[None]] = deque()

    def __len__(self) -> int:
        """Number of flows that wait."""
        return len(self._queue)

    def enter(self) -> Flow[None]:
        """Wait for a place. `leave` gives it back."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            place: ConcurrentFuture[None] = ConcurrentFuture()
            self._queue.append(place)
        try:
            yield from shared_result(place)
        except BaseException:
            with self._lock:
                is_waiting = place in self._queue
                if is_waiting:
                    self._queue.remove(place)
            if not is_waiting:
                self.leave()
            raise

    def leave(self) -> None:
        """Give the place to the next flow in the queue."""
        with self._lock:
            if not self._queue:
                self._free += 1
                return
            place = self._queue.popleft()
        place.set_result(None)


class Lifetime:
    """Ends the flows of an embedder when it is closed."""

    def __init__(self) -> None:
        self.is_closed = False
        self._flows: set[ConcurrentFuture[None]] = set()

    def check(self) -> None:
        """Raise if the owner is closed.

        Raises:
            HalimedeError: it is.
        """
        if self.is_closed:
            raise HalimedeError("this embedder is closed. Open another.")

    def run(self, flow: Flow[T], until_s: float) -> Flow[T]:
        """Return what a flow returns. It is closed when it may not go on.

        Raises:
            TimeoutError: it did not end by then.
            HalimedeError: the owner was closed.
        """
        self.check()
        closing: ConcurrentFuture[None] | None = None
        try:
            while True:
                wait = next(flow)
                if closing is None:  # a call that need not wait has none
                    closing = ConcurrentFuture()
                    self._flows.add(closing)
                self.check()
                if time.monotonic() >= until_s:
                    raise TimeoutError
                yield Wait((*wait.futures, closing), min(wait.until_s, until_s))
                self.check()
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            if closing is not None:
                self._flows.discard(closing)
            flow.close()

    def close(self) -> None:
        """End every flow under way. A second call does nothing."""
        self.is_closed = True
        for closing in list(self._flows):
            if not closing.done():
                closing.set_result(None)
