"""Continuous batching, with a run that says which rows it was given."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from conftest import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from halimede_engine import batching
from halimede_engine.batching import INTERACTIVE_ROWS
from halimede_engine.requests import Outcome
from halimede_engine.scheduler import QUEUED_BULK_ROWS, QUEUED_ROWS, Scheduler
from halimede_engine.session import Row
from halimede_ops.errors import RequestCancelled, ServerOverloaded

TIMEOUT_S = 20.0


class Answer:
    """Waits for one request's outcome."""

    def __init__(self) -> None:
        self._given = threading.Event()
        self._outcomes: list[Outcome] = []

    def __call__(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._given.set()

    def wait(self) -> list[int] | Exception:
        """The results of the request's rows, or what was raised."""
        assert self._given.wait(TIMEOUT_S), "not answered"
        [outcome] = self._outcomes
        return outcome if isinstance(outcome, Exception) else [result.output for result in outcome]


class Gate:
    """A run that holds its thread until opened, and keeps the lengths of each micro-batch."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.parts: list[list[int]] = []

    def run(self, rows: Sequence[Row]) -> list[int]:
        self.parts.append([len(row.ids) for row in rows])
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)
        return first_ids(rows)


def row(length: int, first: int = 0) -> Row:
    ids = np.full(length, first, np.int64)
    return Row(ids, np.ones(length, np.int64))


def first_ids(rows: Sequence[Row]) -> list[int]:
    """Each row's first id."""
    return [int(row.ids[0]) for row in rows]


@contextmanager
def closing(scheduler: Scheduler) -> Iterator[Scheduler]:
    try:
        yield scheduler
    finally:
        scheduler.close()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=9), max_size=30))
def test_each_request_gets_its_own_rows_in_order(requests: list[list[int]]) -> None:
    """Whatever the lengths and whichever thread runs them, vectors return to their request."""
    answers = [Answer() for _ in requests]
    firsts = iter(range(1000))
    expected = []
    with closing(Scheduler(first_ids, batching.plan, threads=3)) as scheduler:
        for lengths, answer in zip(requests, answers, strict=True):
            rows = [row(length, next(firsts)) for length in lengths]
            expected.append(first_ids(rows))
            scheduler.submit(rows, answer)
        assert [answer.wait() for answer in answers] == expected


def test_the_row_that_waited_longest_is_in_the_next_run() -> None:
    """A long text among many short ones is not passed over, and those like it go with it."""
    gate = Gate()
    with closing(Scheduler(gate.run, batching.plan, threads=1)) as scheduler:
        scheduler.submit([row(16)], Answer())
        assert gate.entered.wait(TIMEOUT_S)
        for length in (180, *[16] * 40, 178):
            scheduler.submit([row(length)], Answer())
        gate.opened.set()
    assert gate.parts[0] == [16]
    assert sorted(gate.parts[1]) == [178, 180]
    assert all(set(part) == {16} for part in gate.parts[2:])


def test_a_failed_run_fails_its_requests_alone() -> None:
    """An error reaches the requests whose rows were in the run, and the next ones are served."""

    def run(rows: Sequence[Row]) -> list[int]:
        if any(row.ids[0] == 13 for row in rows):
            raise ValueError("13")
        return first_ids(rows)

    with closing(Scheduler(run, batching.plan, threads=2)) as scheduler:
        bad, good = Answer(), Answer()
        scheduler.submit([row(5, 1), row(250, 13)], bad)
        assert isinstance(bad.wait(), ValueError)
        scheduler.submit([row(5, 2)], good)
        assert good.wait() == [2]


def test_a_request_whose_caller_has_gone_is_not_run() -> None:
    """Its outcome is RequestCancelled; those that waited beside it are run."""
    gate, gone, stays = Gate(), Answer(), Answer()
    opened = Scheduler(gate.run, batching.plan, threads=1, cancel_check_runs=0)
    with closing(opened) as scheduler:
        scheduler.submit([row(16)], Answer())
        assert gate.entered.wait(TIMEOUT_S)
        scheduler.submit([row(16, 1), row(16, 2)], gone, lambda: True)
        scheduler.submit([row(16, 3)], stays, lambda: False)
        gate.opened.set()
        assert isinstance(gone.wait(), RequestCancelled)
        assert stays.wait() == [3]
    assert gate.parts == [[16], [16]]


@pytest.mark.parametrize(("rows", "room"), [(1, QUEUED_ROWS), (32, QUEUED_BULK_ROWS)])
def test_the_caller_is_held_back_until_there_is_room(rows: int, room: int) -> None:
    """With more rows of a lane waiting than may, `wait_for_room` returns when runs took some."""
    gate = Gate()
    with closing(Scheduler(gate.run, batching.plan, threads=1)) as scheduler:
        scheduler.submit([row(16)], Answer())
        assert gate.entered.wait(TIMEOUT_S)
        for _ in range(room // rows):
            scheduler.submit([row(16)] * rows, Answer())
        scheduler.wait_for_room()
        scheduler.submit([row(16)] * rows, Answer())
        caller = threading.Thread(target=scheduler.wait_for_room)
        caller.start()
        caller.join(0.2)
        assert caller.is_alive()
        gate.opened.set()
        caller.join(TIMEOUT_S)
        assert not caller.is_alive()


def test_more_requests_than_may_wait_are_refused() -> None:
    """One beyond the limit raises ServerOverloaded; each lane has its own, and answers make room."""
    gate, answers = Gate(), [Answer() for _ in range(3)]
    with closing(Scheduler(gate.run, batching.plan, threads=1, max_requests=2)) as scheduler:
        scheduler.submit([row(16)], answers[0])
        scheduler.submit([row(16)], answers[1])
        with pytest.raises(ServerOverloaded, match="2 requests wait"):
            scheduler.submit([row(16)], Answer())
        scheduler.submit([row(16)] * (INTERACTIVE_ROWS + 1), answers[2])
        gate.opened.set()
        for answer in answers:
            answer.wait()
        scheduler.submit([row(16)], Answer())


def test_a_single_text_does_not_wait_for_bulk() -> None:
    """While every thread runs bulk and more of it waits, a small request is run and answered."""
    gate, quick = Gate(), threading.Event()

    def run(rows: Sequence[Row]) -> list[int]:
        if rows[0].ids[0] == 7:
            quick.set()
            return first_ids(rows)
        return gate.run(rows)

    with closing(Scheduler(run, batching.plan, threads=1)) as scheduler:
        bulk, single = Answer(), Answer()
        scheduler.submit([row(16)] * QUEUED_ROWS, bulk)
        assert gate.entered.wait(TIMEOUT_S)
        scheduler.submit([row(16, 7)], single)
        assert single.wait() == [7]
        gate.opened.set()
        assert bulk.wait() == [0] * QUEUED_ROWS
    assert quick.is_set()


def test_bulk_does_not_starve() -> None:
    """Beside single texts without end, bulk that came before them is answered."""
    stop = threading.Event()

    def ask_again(_: Outcome = ()) -> None:
        if not stop.is_set():
            with suppress(RequestCancelled):  # it is closed meanwhile
                scheduler.submit([row(16)], ask_again)

    with closing(Scheduler(first_ids, batching.plan, threads=1)) as scheduler:
        for _ in range(4):
            ask_again()
        bulk = Answer()
        scheduler.submit([row(16)] * (INTERACTIVE_ROWS + 1), bulk)
        assert bulk.wait() == [0] * (INTERACTIVE_ROWS + 1)
        stop.set()


def test_what_waits_is_read_together() -> None:
    """Items that come while every thread runs are given to `read` at once, and each request gets
    its own; one that cannot be read fails alone.
    """
    gate, reads = Gate(), []

    def read(items: Sequence[int]) -> list[Row]:
        reads.append(list(items))
        if 13 in items:
            raise ValueError("13")
        return [row(16, item) for item in items]

    answers = [Answer() for _ in range(4)]
    with closing(Scheduler(gate.run, batching.plan, threads=1, make_rows=read)) as scheduler:
        scheduler.submit([1], Answer())
        assert gate.entered.wait(TIMEOUT_S)
        for item, answer in zip((2, 3, 13, 4), answers, strict=True):
            scheduler.submit([item], answer)
        gate.opened.set()
        *given, last = [
            answer.wait() for answer in (answers[0], answers[1], answers[3], answers[2])
        ]
    assert given == [[2], [3], [4]]
    assert isinstance(last, ValueError)
    assert reads[:2] == [[1], [2, 3, 13, 4]]


def test_bulk_is_read_one_request_at_a_time() -> None:
    """A small request that comes behind much bulk is read before most of it."""
    gate, reads = Gate(), []

    def read(items: Sequence[int]) -> list[Row]:
        reads.append(items[0])
        return [row(16, item) for item in items]

    with closing(Scheduler(gate.run, batching.plan, threads=1, make_rows=read)) as scheduler:
        for number in range(8):
            scheduler.submit([number] * QUEUED_ROWS, Answer())
        assert gate.entered.wait(TIMEOUT_S)
        small = Answer()
        scheduler.submit([100], small)
        gate.opened.set()
        assert small.wait() == [100]
    assert reads.index(100) < 4


def test_what_has_all_threads_is_run_alone() -> None:
    """While nothing else waits or is run, `run_alone` has the micro-batch; else `run` has."""
    gate, alone = Gate(), []

    def run_alone(rows: Sequence[Row]) -> list[int]:
        alone.append(first_ids(rows))
        return first_ids(rows)

    scheduler = Scheduler(gate.run, batching.plan, threads=2, run_alone=run_alone)
    with closing(scheduler):
        single = Answer()
        wait_until(lambda: not scheduler._running)
        scheduler.submit([row(16, 1)], single)
        assert single.wait() == [1]
        wait_until(lambda: not scheduler._running)
        scheduler.submit([row(256, 2), row(256, 3)], Answer())
        assert gate.entered.wait(TIMEOUT_S)
        gate.opened.set()
    assert alone[0] == [1]
    assert [256] in gate.parts


def test_closing_answers_what_waits() -> None:
    """Every request submitted before `close` has its answer when `close` returns."""
    answers = [Answer() for _ in range(100)]
    scheduler = Scheduler(first_ids, batching.plan, threads=2)
    for index, answer in enumerate(answers):
        scheduler.submit([row(1 + index, index)], answer)
    scheduler.close()
    assert [answer.wait() for answer in answers] == [[i] for i in range(100)]


def test_a_lone_request_is_run_by_its_caller() -> None:
    """An idle scheduler runs a small request in the caller's thread, and has no other thread."""
    runs: list[threading.Thread] = []
    before = threading.active_count()

    def run_alone(rows: Sequence[Row]) -> list[int]:
        runs.append(threading.current_thread())
        return first_ids(rows)

    scheduler = Scheduler(first_ids, batching.plan, threads=2, run_alone=run_alone)
    with closing(scheduler):
        done = scheduler.run_now([row(16, 1), row(32, 2)])
        assert done is not None and done[1] == [1, 2]
        assert runs == [threading.current_thread()]
        assert threading.active_count() == before
        assert scheduler.run_now([row(16)] * (INTERACTIVE_ROWS + 1)) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_a_caller_that_runs_counts_as_a_thread(threads: int) -> None:
    """A request that comes meanwhile is run at once beside it if a thread is free, and by `run`;
    else as soon as the caller's run has ended.
    """
    gate, beside, answer = Gate(), threading.Event(), Answer()

    def run(rows: Sequence[Row]) -> list[int]:
        beside.set()
        return first_ids(rows)

    scheduler = Scheduler(run, batching.plan, threads=threads, run_alone=gate.run)
    with closing(scheduler):
        caller = threading.Thread(target=scheduler.run_now, args=([row(16, 1)],))
        caller.start()
        assert gate.entered.wait(TIMEOUT_S)
        assert scheduler.run_now([row(16, 2)]) is None
        scheduler.submit([row(16, 3)], answer)
        assert beside.wait(TIMEOUT_S if threads == 2 else 0.2) == (threads == 2)
        gate.opened.set()
        assert answer.wait() == [3]
        caller.join(TIMEOUT_S)
        wait_until(lambda: not scheduler._running)
        assert scheduler.run_now([row(16, 4)]) is not None


def test_a_failed_run_of_a_caller_leaves_the_scheduler_free() -> None:
    """The caller gets the error, and the next request is run."""

    def run(rows: Sequence[Row]) -> list[int]:
        if rows[0].ids[0] == 13:
            raise ValueError("13")
        return first_ids(rows)

    with closing(Scheduler(run, batching.plan, threads=1)) as scheduler:
        with pytest.raises(ValueError, match="13"):
            scheduler.run_now([row(16, 13)])
        done = scheduler.run_now([row(16, 1)])
        assert done is not None and done[1] == [1]


def test_a_closed_scheduler_refuses_requests() -> None:
    """A request after `close` is an error at once, never one that nobody answers."""
    scheduler = Scheduler(first_ids, batching.plan, threads=1)
    scheduler.close()
    assert scheduler.run_now([row(16)]) is None
    with pytest.raises(RequestCancelled, match="closed"):
        scheduler.submit([row(16)], Answer())
    scheduler.close()


def test_requests_are_answered_where_no_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a program no thread starts: the caller runs all that is queued."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    scheduler, answers = Scheduler(first_ids, batching.plan, threads=2), [Answer(), Answer()]
    scheduler.submit([row(16, index) for index in range(40)], answers[0])
    scheduler.submit([row(16, 7)], answers[1])
    assert answers[0].wait() == list(range(40)) and answers[1].wait() == [7]
    scheduler.close()


class Garbage:
    """A cycle whose finaliser is called when the garbage collector runs."""

    def __init__(self, finaliser: Callable[[], object]) -> None:
        self.finaliser = finaliser
        self.cycle = self

    def __del__(self) -> None:
        self.finaliser()


def threads_of(scheduler: Scheduler) -> list[threading.Thread | None]:
    return [*scheduler._run_threads, scheduler._answer_thread]


@pytest.mark.parametrize("method", ["stop", "close"])
@pytest.mark.parametrize("place", ["plan", "run", "answer"])
def test_a_finaliser_ends_the_threads_wherever_it_runs(method: str, place: str) -> None:
    """The garbage collector may run in any thread of the scheduler, while it holds the lock (as
    during `plan`) or not: what is queued is answered, and the threads end.
    """
    collected, answer = threading.Event(), Answer()

    def collect(here: str) -> None:
        if here == place and not collected.is_set():
            Garbage(getattr(scheduler, method))
            gc.collect()
            collected.set()

    def run(rows: Sequence[Row]) -> list[int]:
        collect("run")
        return first_ids(rows)

    def plan(lengths: Sequence[int], streams: int) -> list[list[int]]:
        collect("plan")
        return batching.plan(lengths, streams)

    def answered(outcome: Outcome) -> None:
        collect("answer")
        answer(outcome)

    scheduler = Scheduler(run, plan, threads=1)
    scheduler.submit([row(16, 5)], answered)
    assert answer.wait() == [5]
    assert collected.wait(TIMEOUT_S)
    wait_until(lambda: not any(thread and thread.is_alive() for thread in threads_of(scheduler)), 5)


@pytest.mark.parametrize("method", ["stop", "close"])
def test_a_finaliser_in_a_caller_that_holds_the_lock_returns(method: str) -> None:
    """Both are called in a thread that holds the lock, and the threads end when it is free."""
    answer, returned = Answer(), threading.Event()
    scheduler = Scheduler(first_ids, batching.plan, threads=2)
    scheduler.submit([row(16, 5)], answer)
    assert answer.wait() == [5]

    def collect() -> None:
        with scheduler._lock:
            Garbage(getattr(scheduler, method))
            gc.collect()
            returned.set()

    threading.Thread(target=collect, daemon=True).start()
    assert returned.wait(5)
    wait_until(lambda: not any(thread and thread.is_alive() for thread in threads_of(scheduler)), 5)
