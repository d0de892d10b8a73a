"""The one event loop of the process that every embedder's flow runs on.

One, not one an embedder: gRPC's asyncio polls with one thread a process, and wakes every loop
that uses it for each event of any.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from halimede_ops.errors import HalimedeError

T = TypeVar("T")
STOP_TIMEOUT_S = 2.0


class Loop:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="halimede", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def submit(self, flow: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """The future of a coroutine that has been started; cancelling it cancels the coroutine.

        Raises:
            HalimedeError: this process was forked from the one that owns the loop.
        """
        if os.getpid() != self.pid:
            flow.close()
            raise HalimedeError(
                "this embedder was opened before the process was forked, and connections do not "
                "survive that. Open one in each process, or start them with 'spawn'."
            )
        return asyncio.run_coroutine_threadsafe(flow, self._loop)

    def wait(self, flow: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns; an interrupt (Ctrl-C) cancels it."""
        if threading.current_thread() is self._thread:
            flow.close()
            raise HalimedeError("a blocking call was made on the client's own event loop.")
        future = self.submit(flow)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop(self) -> None:
        if os.getpid() != self.pid or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)


_shared: Loop | None = None
_starting = threading.Lock()


def shared() -> Loop:
    """The process's loop, started on first use."""
    global _shared
    with _starting:
        if _shared is None or _shared.pid != os.getpid():
            _shared = Loop()
        return _shared
