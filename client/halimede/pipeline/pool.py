"""Threads for calls that block: SDKs, files and stores.

Unlike `concurrent.futures.ThreadPoolExecutor`, a pool works in an `atexit` handler, never delays
the end of the program, and has no threads while it has nothing to do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
IDLE_S = 2.0
"""Seconds after which a thread without work ends."""


class Pool:
    """At most `most` daemon threads."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = f"halimede-{name}"
        self._changed = threading.Condition()
        self._calls: deque[tuple[Future[Any], Callable[[], None]]] = deque()
        self._threads = self._idle = 0
        self._closed = False

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Return the future of a call in a thread.

        Where no thread can be started, as at the end of the program, the call runs here and now.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*args)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            if self._closed:
                future.cancel()
                return future
            self._calls.append((future, run))
            self._changed.notify()
            if len(self._calls) <= self._idle or self._threads == self._most:
                return future
            self._threads += 1
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # the interpreter is shutting down
            self._work(idle_s=0)
        return future

    def close(self) -> None:
        """Cancel the calls that wait for a thread. Those under way end by themselves."""
        with self._changed:
            self._closed = True
            waiting = list(self._calls)
            self._calls.clear()
            self._changed.notify_all()
        for future, _ in waiting:
            future.cancel()

    def _work(self, idle_s: float = IDLE_S) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._calls or self._closed, idle_s)
                self._idle -= 1
                if not self._calls:
                    self._threads -= 1
                    return
                future, run = self._calls.popleft()
            run()
            del future, run  # what they refer to may be large
