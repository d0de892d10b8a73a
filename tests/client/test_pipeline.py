"""The parts of the pipeline: drivers, shared reads, places, threads and breakers."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import wait_until

from halimede import (
    AsyncEmbedder,
    DeadlineExceeded,
    Embedder,
    HalimedeError,
    NonFiniteVector,
    OutOfMemory,
    ServerOverloaded,
    ServerUnreachable,
)
from halimede.config.file import parse
from halimede.pipeline import circuit_breaker, guard
from halimede.pipeline.circuit_breaker import CircuitBreaker
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import Gate, Lifetime, SharedRead, completed
from halimede.pipeline.tasks import EMBED
from halimede.pipeline.waiting import Flow, Wait, drive, drive_async, result_of, together
from halimede.testing import FakeProvider

DRIVERS = [drive, lambda flow: asyncio.run(drive_async(flow))]


def through(*providers: FakeProvider, **rules: Any) -> Embedder:
    return Embedder(
        config=parse({"models": {"m": {"provider": "hash"}}, **rules}), providers=providers
    )


def after(seconds: float, value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    threading.Timer(seconds, future.set_result, [value]).start()
    return future


@pytest.mark.parametrize("driver", DRIVERS, ids=["blocking", "asyncio"])
class TestDrivers:
    def test_a_flow_gets_its_results(self, driver: Callable[[Flow[Any]], Any]) -> None:
        """Futures that are done and that come later, pauses and sub-flows, in either driver."""

        def flow() -> Flow[list[int]]:
            first = yield from result_of(completed(1))
            second = yield from result_of(after(0.02, 2))
            yield Wait((), time.monotonic() + 0.02)
            rest = yield from together(
                [result_of(after(0.03 - 0.01 * index, index)) for index in range(3)], 2
            )
            return [first, second, *rest]

        assert driver(flow()) == [1, 2, 0, 1, 2]

    def test_a_flow_that_gives_up_cancels_what_it_started(
        self, driver: Callable[[Flow[Any]], Any]
    ) -> None:
        """Of several sub-flows one fails: the futures of the others are cancelled."""
        others: list[Future[Any]] = [Future(), Future()]

        def fails() -> Flow[None]:
            yield Wait((), time.monotonic() + 0.01)
            raise ValueError

        with pytest.raises(ValueError):
            driver(together([*map(result_of, others), fails()], 3))
        assert all(future.cancelled() for future in others)

    def test_no_more_than_allowed_run_at_once(self, driver: Callable[[Flow[Any]], Any]) -> None:
        """Of 20 sub-flows at most 4 have begun and not ended."""
        running, most = 0, 0

        def one() -> Flow[None]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            yield Wait((), time.monotonic() + 0.002)
            running -= 1

        driver(together([one() for _ in range(20)], 4))
        assert most == 4

    def test_time_limits(self, driver: Callable[[Flow[Any]], Any]) -> None:
        """A future that is not done in time raises TimeoutError, and is cancelled."""
        future: Future[Any] = Future()
        with pytest.raises(TimeoutError):
            driver(result_of(future, time.monotonic() + 0.02))
        assert future.cancelled()


def test_cancelling_a_task_closes_its_flow() -> None:
    """asyncio's cancellation reaches what the flow started."""
    future: Future[Any] = Future()

    async def run() -> None:
        task = asyncio.ensure_future(drive_async(result_of(future)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert future.cancelled()


def test_a_shared_read_is_shared_and_goes_on() -> None:
    """Callers before its end share a read; one that gives up does not end it; a fresh read begins
    after the current one.
    """
    reads: list[Future[int]] = []

    def start() -> Future[int]:
        reads.append(Future())
        return reads[-1]

    shared = SharedRead(start)
    first, second = shared.read(), shared.read()
    assert first is second
    fresh = shared.read(fresh=True)
    assert len(reads) == 1
    reads[0].set_result(1)
    assert (first.result(), len(reads)) == (1, 2)
    reads[1].set_exception(ValueError())
    with pytest.raises(ValueError):
        fresh.result(1)
    shared.read()
    assert len(reads) == 3


def test_a_gate_keeps_the_order_and_forgets_who_left() -> None:
    """Places are given in the order of arrival; a flow that is closed gives up its place."""
    gate = Gate(1)
    drive(gate.enter())
    flows = [gate.enter() for _ in range(3)]
    waits = [next(flow) for flow in flows]
    assert len(gate) == 3
    flows[0].close()
    assert len(gate) == 2
    gate.leave()
    assert [wait.is_over() for wait in waits[1:]] == [True, False]
    flows[1].close()  # it had its place and was closed before it knew
    assert waits[2].is_over()


def test_a_closed_lifetime_ends_its_flows() -> None:
    """A flow that waits for something that never comes ends when its owner is closed."""
    lifetime, future = Lifetime(), Future()
    threading.Timer(0.05, lifetime.close).start()
    with pytest.raises(HalimedeError, match="is closed"):
        drive(lifetime.run(result_of(future), float("inf")))
    assert future.cancelled()


def test_a_pool_has_threads_only_while_it_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `most` calls run at once, every call is answered, and idle threads end."""
    monkeypatch.setattr("halimede.pipeline.pool.IDLE_S", 0.1)
    monkeypatch.setattr(Pool._work, "__defaults__", (0.1,))
    pool, running, most, lock = Pool(3, "test"), 0, 0, threading.Lock()

    def work(value: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        if value == 13:
            raise ValueError
        return value

    futures = [pool.submit(work, value) for value in range(50)]
    assert [future.result(10) for future in futures if future is not futures[13]] == [
        value for value in range(50) if value != 13
    ]
    assert isinstance(futures[13].exception(), ValueError)
    assert most == 3
    wait_until(lambda: not any("halimede-test" in one.name for one in threading.enumerate()))
    pool.close()
    assert pool.submit(work, 1).cancelled()


def test_a_pool_works_where_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the program a call runs in the caller's thread."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pool = Pool(2, "test")
    assert pool.submit(threading.current_thread).result() is threading.current_thread()
    assert pool.submit(int, "7").result() == 7


class TestBreaker:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(circuit_breaker, "FIRST_PROBE_S", 0.01)
        monkeypatch.setattr(circuit_breaker, "LONGEST_PROBE_S", 0.02)

    @pytest.mark.parametrize(
        "error", [OSError(), MemoryError(), ServerUnreachable("down"), KeyError(1)]
    )
    def test_it_probes_until_a_probe_succeeds(self, error: Exception) -> None:
        """Whatever a probe raises, the next one may succeed, and closes the breaker."""
        probes: list[float] = []

        def probe(timeout_s: float) -> None:
            probes.append(timeout_s)
            if len(probes) < 4:
                raise error

        breaker = CircuitBreaker(probe, max_failures=2)
        breaker.record_failure()
        assert not breaker.is_open
        breaker.record_failure()
        assert breaker.is_open
        wait_until(lambda: not breaker.is_open)
        assert len(probes) == 4

    def test_nothing_is_probed_after_close(self) -> None:
        """A failure that comes after `close` starts no probe."""
        probes: list[float] = []
        breaker = CircuitBreaker(probes.append, max_failures=1)
        breaker.close()
        breaker.record_failure()
        time.sleep(0.1)
        assert probes == []

    def test_a_dropped_breaker_is_collected(self) -> None:
        """The thread that probes does not keep an embedder that nobody uses."""

        def fails(_: float) -> None:
            raise ServerUnreachable("down")

        breaker = CircuitBreaker(fails, max_failures=1)
        breaker.record_failure()
        reference = weakref.ref(breaker)
        del breaker
        wait_until(lambda: gc.collect() >= 0 and reference() is None)


def test_one_out_of_memory_is_forgotten() -> None:
    """After one moment without memory, requests soon have their full size again."""
    fake = FakeProvider(max_batch_size=64)
    texts = [f"text {index}" for index in range(640)]
    with through(fake) as embedder:
        embedder.embed("a")
        fake.fail(*[OutOfMemory("once")] * 4)
        embedder.embed(texts)
        for _ in range(8):
            embedder.embed(texts)
        fake.requests.clear()
        embedder.embed(texts)
    assert [len(request.inputs) for request in fake.requests] == [64] * 10


def test_cancelled_callers_give_their_turns_back() -> None:
    """Under a rate limit, callers that give up do not make the next one wait for their turns."""

    async def run() -> float:
        model = {"provider": "hash", "requests_per_s": 5}
        async with AsyncEmbedder(config=parse({"models": {"m": model}})) as embedder:
            await embedder.embed("first")
            waiting = [asyncio.ensure_future(embedder.embed(f"{index}")) for index in range(20)]
            await asyncio.sleep(0.05)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            began_s = time.monotonic()
            await embedder.embed("next")
            return time.monotonic() - began_s

    assert asyncio.run(run()) < 1  # 20 turns take 4 s


class Slow(FakeProvider):
    """A provider that is described after a while, and counts the descriptions."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.descriptions = 0

    def describe(self, timeout_s: float, kind: Any = None) -> Any:
        self.descriptions += 1
        future: Future[Any] = Future()
        model = super().describe(timeout_s, kind).result()
        timer = threading.Timer(self.seconds, future.set_result, [model])
        timer.daemon = True
        timer.start()
        return future


def test_a_cold_start_under_a_deadline_ends() -> None:
    """An opening slower than every caller's deadline goes on, is shared, and is the only one."""
    slow = Slow(1.0)
    with through(slow) as embedder:
        for _ in range(4):
            with pytest.raises(DeadlineExceeded):
                embedder.embed("a", deadline_s=0.1)
        wait_until(lambda: embedder.stats()["models"])
        assert embedder.embed("a", deadline_s=0.5).dims == 384
    assert slow.descriptions == 1


def test_a_short_deadline_does_not_end_another_callers_read() -> None:
    """A caller with 10 ms gives up alone; one that shares its read of the metadata is answered."""
    slow = Slow(0.5)
    with through(slow) as embedder:
        failures: list[BaseException] = []

        def impatient() -> None:
            try:
                embedder.embed("a", deadline_s=0.01)
            except DeadlineExceeded as error:
                failures.append(error)

        thread = threading.Thread(target=impatient)
        thread.start()
        assert embedder.embed("b").dims == 384
        thread.join()
    assert len(failures) == 1
    assert slow.descriptions == 1


def test_retry_after_is_honoured() -> None:
    """A server that asks for a pause gets it; one longer than `timeout_s` ends the attempts."""
    fake = FakeProvider()
    busy = ServerOverloaded("busy")
    busy.retry_after_s = 0.5
    with through(fake) as embedder:
        embedder.embed("a")
        fake.fail(busy)
        began_s = time.monotonic()
        embedder.embed("a")
        assert time.monotonic() - began_s >= 0.5
        busy.retry_after_s = 3600
        fake.fail(busy)
        with pytest.raises(ServerOverloaded):
            embedder.embed("a")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [1, 5])
def test_a_vector_that_is_not_finite_is_an_error(bad: float, count: int) -> None:
    """No provider's answer may hold NaN or infinity, whatever gave it."""
    fake = FakeProvider(vectors={"bad": [1.0, bad, 0.0], "good": [1.0, 0.0, 0.0]})
    with through(fake) as embedder:
        with pytest.raises(NonFiniteVector, match="NaN or infinity") as raised:
            embedder.embed(["good"] * (count - 1) + ["bad"])
        assert raised.value.index == count - 1


def test_progress_never_passes_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a call begins anew at another provider, so does its progress."""
    done = 0

    class Bar:
        def advance(self, count: int) -> None:
            nonlocal done
            done += count

        def restart(self) -> None:
            nonlocal done
            done = 0

    first, second = FakeProvider("first"), FakeProvider("second")
    with through(first, second) as embedder:
        embedder.embed("a")
        first.fail(*[ServerUnreachable("down")] * 0)
        call = embedder._call(EMBED, [b"x %d" % index for index in range(640)], {}, Bar())
        original = first.embed

        def dies(request: Any, timeout_s: float) -> Any:
            if len(first.requests) > 5:
                raise ServerUnreachable("down")
            return original(request, timeout_s)

        first.embed = dies  # type: ignore[method-assign]
        drive(embedder._pipeline.embed(call))
    assert done == 640


def test_the_models_config_is_read_once() -> None:
    """A hundred calls without a cache describe the model once."""
    slow = Slow(0.0)
    with through(slow) as embedder:
        for index in range(100):
            embedder.embed(f"text {index}")
    assert slow.descriptions == 1


def test_a_call_under_way_at_close_ends_in_words() -> None:
    """It neither goes on nor starts probes or connections again."""
    fake = FakeProvider(latency_s=30)
    embedder = through(fake)
    threading.Timer(0.2, embedder.close).start()
    with pytest.raises(HalimedeError, match="is closed"):
        embedder.embed("a")
    assert fake.is_closed
    assert len(fake.requests) == 1
    assert guard.UNHEALTHY_LATENCY_S
