"""The load generator: each driver keeps so many requests under way, and counts what comes of them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from halimede_tools.bench import closed_loop


class Gauge:
    """A server that answers after 20 ms, refuses every tenth request, and counts those at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.seen: list[int] = []
        self._lock = threading.Lock()

    def enter(self, request: int) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.seen.append(request)

    def leave(self, request: int) -> int:
        with self._lock:
            self.now -= 1
        if request % 10 == 9:
            raise ValueError(request)
        return request

    def blocking(self, request: int) -> int:
        self.enter(request)
        time.sleep(0.02)
        return self.leave(request)

    async def coroutine(self, request: int) -> int:
        self.enter(request)
        await asyncio.sleep(0.02)
        return self.leave(request)


def drive(driver: str, gauge: Gauge, callers: int) -> closed_loop.Load:
    requests = range(40)
    if driver == "threads":
        return closed_loop.threads(gauge.blocking, requests, callers)
    if driver == "coroutines":
        return asyncio.run(closed_loop.coroutines(gauge.coroutine, requests, callers))
    with ThreadPoolExecutor(2 * callers) as pool:
        return closed_loop.futures(
            lambda request: pool.submit(gauge.blocking, request), requests, callers
        )


@pytest.mark.parametrize("callers", [1, 8])
@pytest.mark.parametrize("driver", ["threads", "futures", "coroutines"])
def test_each_request_is_sent_once_and_measured(driver: str, callers: int) -> None:
    """As many at once as there are callers, never more; errors are counted by name."""
    gauge = Gauge()
    load = drive(driver, gauge, callers)
    assert sorted(gauge.seen) == list(range(40))
    assert gauge.most == callers
    assert load.requests == 40
    assert load.errors == {"ValueError": 4}
    assert len(load.latencies_s) == 36
    assert min(load.latencies_s) >= 0.019
    assert load.seconds >= 40 * 0.019 / callers
    with pytest.raises(ValueError) as caught:
        load.raise_errors()
    assert caught.value.__notes__ == ["4 of 40 requests failed: ValueError 4"]


def test_one_caller_is_the_calling_thread() -> None:
    """Some engines are fastest in the thread that made them."""
    callers: set[int] = set()
    load = closed_loop.threads(lambda _: callers.add(threading.get_ident()), range(3), 1)
    load.raise_errors()
    assert callers == {threading.get_ident()}
