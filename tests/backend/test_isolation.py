"""What fails, fails alone: requests, callbacks and threads of a scheduler."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from conftest import MODEL, version_folder, wait_until
from test_scheduler import TIMEOUT_S, Answer, Gate, closing, first_ids, row, threads_of

from halimede_engine import batching
from halimede_engine.engine import SharedEngine, text_bytes, text_rows
from halimede_engine.requests import Outcome
from halimede_engine.response_cache import ResponseCache
from halimede_engine.scheduler import Scheduler
from halimede_engine.session import FILE_NAME, Row, open_session
from halimede_ops import spec, text, vectors
from halimede_ops.errors import HalimedeError, RequestCancelled, ServerError
from halimede_tools.settings import Settings

BAD = 13


def run(rows: Sequence[Row]) -> list[int]:
    """Fails if a row of the micro-batch is bad."""
    if any(one.ids[0] == BAD for one in rows):
        raise ValueError(BAD)
    return first_ids(rows)


def fail(*_: object) -> object:
    raise OSError("a callback failed")


def queued_behind(gate: Gate, scheduler: Scheduler, requests: list[list[Row]]) -> list[Answer]:
    """Submit requests while the only thread is held up, so that they run together."""
    scheduler.submit([row(16)], Answer())
    assert gate.entered.wait(TIMEOUT_S)
    answers = [Answer() for _ in requests]
    for rows, answer in zip(requests, answers, strict=True):
        scheduler.submit(rows, answer)
    gate.opened.set()
    return answers


@pytest.mark.parametrize("rows", [1, 9], ids=["interactive", "bulk"])
def test_a_bad_row_fails_its_request_and_no_other_of_the_micro_batch(rows: int) -> None:
    """Six requests in one run, one of them bad: five get their answers. The bad one has good rows
    too, and gets the error of its own.
    """
    gate, together = Gate(), []

    def run_gated(given: Sequence[Row]) -> list[int]:
        together.append(len(given))
        gate.run(given)
        return run(given)

    with closing(Scheduler(run_gated, batching.plan, threads=1)) as scheduler:
        requests = [[row(16, number)] * rows for number in range(5)]
        requests.insert(3, [row(16, 90)] * (rows - 1) + [row(16, BAD)])
        answers = queued_behind(gate, scheduler, requests)
        *good, bad = (answers[index].wait() for index in (0, 1, 2, 4, 5, 3))
    assert good == [[number] * rows for number in range(5)]
    assert isinstance(bad, ValueError)
    assert max(together) > rows, "they did not run together"


def test_a_request_that_failed_is_not_run_further() -> None:
    """Its other rows leave the queue, and it is answered once."""
    runs: list[int] = []

    def counted(rows: Sequence[Row]) -> list[int]:
        runs.append(len(rows))
        return run(rows)

    with closing(Scheduler(counted, batching.plan, threads=1)) as scheduler:
        bad = Answer()
        scheduler.submit([row(256, BAD), *[row(256, 1)] * 99], bad)
        assert isinstance(bad.wait(), ValueError)
    assert sum(runs) < 20


@pytest.mark.parametrize("outputs", [[], [1, 2, 3], None], ids=["too few", "too many", "none"])
def test_a_wrong_number_of_outputs_is_an_error_of_the_run(outputs: list[int] | None) -> None:
    """It is no thread's end, and no request gets another's output."""

    def broken(rows: Sequence[Row]) -> list[int]:
        return outputs if rows[0].ids[0] == BAD else first_ids(rows)  # type: ignore[return-value]

    with closing(Scheduler(broken, batching.plan, threads=1)) as scheduler:
        answers = [Answer(), Answer()]
        scheduler.submit([row(16, BAD)], answers[0])
        assert isinstance(answers[0].wait(), (ValueError, TypeError))
        scheduler.submit([row(16, 1)], answers[1])
        assert answers[1].wait() == [1]


def test_too_few_rows_are_an_error_of_their_requests() -> None:
    """Rows that `make_rows` leaves out shift no other request's rows."""
    gate = Gate()

    def make_rows(items: Sequence[Row]) -> list[Row]:
        return [item for item in items if item.ids[0] != BAD]

    scheduler = Scheduler(gate.run, batching.plan, threads=1, make_rows=make_rows)
    with closing(scheduler):
        requests = [[row(16, 1)], [row(16, BAD)], [row(16, 2)], [row(16, BAD)] * 9]
        answers = queued_behind(gate, scheduler, requests)
        assert [answers[0].wait(), answers[2].wait()] == [[1], [2]]
        assert isinstance(answers[1].wait(), ValueError)
        assert isinstance(answers[3].wait(), ValueError)


PLANS: dict[str, Callable[..., object]] = {
    "raises": fail,
    "is empty": lambda lengths, streams: [],
    "leaves out": lambda lengths, streams: [[0]],
    "repeats": lambda lengths, streams: [[0], list(range(len(lengths)))],
    "is beyond": lambda lengths, streams: [[len(lengths)]],
}


@pytest.mark.parametrize("plan", PLANS)
def test_without_a_plan_each_row_runs_alone(plan: str) -> None:
    """Every request is answered, whatever `plan` gives, and the error is told."""
    gate, told = Gate(), []
    scheduler = Scheduler(gate.run, PLANS[plan], threads=1, on_error=told.append)  # type: ignore
    with closing(scheduler):
        requests = [[row(16, number)] * 3 for number in range(4)]
        answers = queued_behind(gate, scheduler, requests)
        assert [answer.wait() for answer in answers] == [[number] * 3 for number in range(4)]
    assert told


@pytest.mark.parametrize("callback", ["on_run", "clock", "on_error", "is_cancelled", "answer"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_callback_that_raises_ends_nothing(callback: str, rows: int) -> None:
    """All requests before, beside and after it are answered, and its error is told."""
    told: list[Exception] = []
    callbacks = {callback: fail} if callback in ("on_run", "clock") else {}
    on_error = fail if callback == "on_error" else told.append
    callbacks |= {"on_error": on_error, **({"on_run": fail} if callback == "on_error" else {})}
    scheduler = Scheduler(first_ids, batching.plan, 1, cancel_check_runs=-1, **callbacks)  # type: ignore
    with closing(scheduler):
        for number in range(20):
            answer, beside = Answer(), Answer()
            is_cancelled = fail if callback == "is_cancelled" else lambda: False
            scheduler.submit([row(16, number)] * rows, answer, is_cancelled)  # type: ignore
            if callback == "answer":
                scheduler.submit([row(16, number)] * rows, fail)  # type: ignore
            scheduler.submit([row(16, number + 1)], beside)
            assert answer.wait() == [number] * rows and beside.wait() == [number + 1]
        assert all(thread and thread.is_alive() for thread in threads_of(scheduler))
    assert callback == "on_error" or told
    assert {type(error) for error in told} <= {OSError}


@pytest.mark.parametrize("place", ["make_rows", "run", "plan", "answer", "on_run"])
def test_a_lost_thread_is_said(place: str) -> None:
    """What ends a thread after all, such as SystemExit: every request that waits gets ServerError,
    every later one at once, `on_broken` is called, and `close` returns.
    """
    broken: list[BaseException] = []
    release = threading.Event()

    def end(*_: object) -> object:
        assert release.wait(TIMEOUT_S)
        raise SystemExit(1)

    callbacks = {place: end} if place in ("make_rows", "on_run") else {}
    scheduler = Scheduler(
        end if place == "run" else first_ids,  # type: ignore
        end if place == "plan" else batching.plan,  # type: ignore
        1,
        on_broken=broken.append,
        **callbacks,  # type: ignore
    )
    answers = [Answer() for _ in range(5)]
    scheduler.submit([row(16)], end if place == "answer" else Answer())  # type: ignore

    def send() -> None:
        with contextlib.suppress(ServerError):  # `plan` holds the lock until it ends its thread
            for answer in answers:
                scheduler.submit([row(16, 1)] * 9, answer)

    sender = threading.Thread(target=send)
    sender.start()
    if place != "plan":
        sender.join(TIMEOUT_S)
    release.set()
    wait_until(lambda: broken, 10)
    sender.join(TIMEOUT_S)
    if place != "plan":
        outcomes = [answer.wait() for answer in answers]
        assert all(isinstance(one, ServerError) or one == [1] * 9 for one in outcomes)
    with pytest.raises(ServerError, match=r"lost a thread \(SystemExit\)"):
        scheduler.submit([row(16)], Answer())
    scheduler.stop()
    wait_until(lambda: not any(one and one.is_alive() for one in threads_of(scheduler)), 10)
    scheduler.close()


def test_rows_that_are_made_while_a_thread_is_lost_are_not_queued() -> None:
    """The threads end: nobody would run those rows."""
    reading, go_on, broken = threading.Event(), threading.Event(), threading.Event()

    def make_rows(items: Sequence[Row]) -> list[Row]:
        if len(items) > 1:
            reading.set()
            assert go_on.wait(TIMEOUT_S)
        return list(items)

    def end(rows: Sequence[Row]) -> list[int]:
        raise SystemExit(1)

    scheduler = Scheduler(
        end, batching.plan, 1, make_rows=make_rows, on_broken=lambda error: broken.set()
    )
    bulk, single = Answer(), Answer()
    scheduler.submit([row(16)] * 9, bulk)
    assert reading.wait(TIMEOUT_S)
    scheduler.submit([row(16)], single)
    assert broken.wait(TIMEOUT_S)
    go_on.set()
    assert isinstance(bulk.wait(), ServerError) and isinstance(single.wait(), ServerError)
    wait_until(lambda: not any(one and one.is_alive() for one in threads_of(scheduler)), 10)


def test_too_few_threads_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system starts some threads and not all, requests get ServerError and none hangs."""
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    scheduler, answer = Scheduler(first_ids, batching.plan, threads=2), Answer()
    scheduler.submit([row(16)], answer)
    assert isinstance(answer.wait(), ServerError)
    with pytest.raises(ServerError, match="too few threads"):
        scheduler.submit([row(16)], Answer())
    scheduler.close()
    wait_until(lambda: not any(thread.is_alive() for thread in started), 10)


def closed_while_it_works(threads: int, rows: int) -> None:
    """Close a scheduler while a caller runs in it and others submit."""
    gate, hold = Gate(), Gate()
    scheduler = Scheduler(gate.run, batching.plan, threads, run_alone=hold.run)
    caller = threading.Thread(target=scheduler.run_now, args=([row(16, 1)],))
    caller.start()
    assert hold.entered.wait(TIMEOUT_S)
    answers = [Answer() for _ in range(4)]
    for answer in answers:
        scheduler.submit([row(16, 5)] * rows, answer)
    closers = [threading.Thread(target=scheduler.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    wait_until(lambda: scheduler._closed)
    time.sleep(0.05)
    with pytest.raises(RequestCancelled):
        scheduler.submit([row(16)], Answer())
    gate.opened.set()
    hold.opened.set()
    assert [answer.wait() for answer in answers] == [[5] * rows] * 4
    for closer in closers:
        closer.join(TIMEOUT_S)
        assert not closer.is_alive(), "close did not return"
    with pytest.raises(RequestCancelled):
        scheduler.submit([row(16)], Answer())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 9])
def test_close_answers_what_waits_and_returns(threads: int, rows: int) -> None:
    """Also while a caller's own run takes one of the threads' turns."""
    closed_while_it_works(threads, rows)


def test_close_answers_what_the_urgent_thread_leaves() -> None:
    """It reads a request of middle size while the scheduler is closed, and does not run it."""
    gate, reading, go_on = Gate(), threading.Event(), threading.Event()

    def make_rows(items: Sequence[Row]) -> list[Row]:
        if threading.current_thread().name == "engine-urgent":
            reading.set()
            assert go_on.wait(TIMEOUT_S)
        return list(items)

    scheduler = Scheduler(
        gate.run, batching.plan, 1, make_rows=make_rows, run_alone=first_ids, cancel_check_runs=0
    )
    long, bulk = Answer(), Answer()
    scheduler.submit([row(200, 1)] * 12, bulk)  # several runs, on `run`
    assert gate.entered.wait(TIMEOUT_S)
    scheduler.submit([row(200, 2)], long)
    assert reading.wait(TIMEOUT_S)
    closer = threading.Thread(target=scheduler.close)
    closer.start()
    wait_until(lambda: scheduler._closed)
    gate.opened.set()
    assert bulk.wait() == [1] * 12
    time.sleep(0.1)
    go_on.set()
    assert long.wait() == [2]
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()


@pytest.mark.parametrize("threads", [1, 3])
def test_each_request_that_races_with_close_is_answered_or_refused(threads: int) -> None:
    """Whatever the order of `submit` and `close`: no request hangs."""
    for round_ in range(60):
        scheduler = Scheduler(first_ids, batching.plan, threads)
        accepted: list[Answer] = []
        started = threading.Barrier(4)

        def send(
            scheduler: Scheduler = scheduler,
            accepted: list[Answer] = accepted,
            started: threading.Barrier = started,
            rows: int = 1 + 8 * (round_ % 2),
        ) -> None:
            started.wait()
            for number in range(200):
                answer = Answer()
                try:
                    scheduler.submit([row(16 + number % 3 * 100, number)] * rows, answer)
                except RequestCancelled:
                    return
                accepted.append(answer)

        senders = [threading.Thread(target=send) for _ in range(3)]
        for sender in senders:
            sender.start()
        started.wait()
        time.sleep(0.0005 * (round_ % 8))
        closer = threading.Thread(target=scheduler.close)
        closer.start()
        for thread in (*senders, closer):
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert all(isinstance(answer.wait(), list) for answer in accepted)


def strangers(requests: int) -> Counter[str]:
    """Send mixed requests, one in fifty wrong, by 16 callers; check what each gets."""
    waiting, done, outcomes = threading.Semaphore(256), threading.Event(), Counter[str]()
    told: list[Exception] = []

    def make_rows(items: Sequence[Row]) -> list[Row]:
        if any(item.ids[0] == 2 * BAD for item in items):
            raise KeyError(2 * BAD)
        return list(items)

    def is_cancelled(is_wrong: bool) -> bool:
        return is_wrong and bool(fail())

    scheduler = Scheduler(run, batching.plan, 2, make_rows=make_rows, on_error=told.append)
    lock = threading.Lock()

    def send(chance: random.Random, number: int) -> None:
        kind = chance.randrange(4) if number % 50 == 0 else -1
        count = chance.choice([1, 1, 1, 1, 2, 5, 8, 9, 30])
        first = chance.randrange(100, 10**6)
        rows = [row(chance.choice([4, 16, 40, 120, 256]), first + one) for one in range(count)]
        if kind in (0, 1):
            rows[chance.randrange(count)] = row(16, BAD * (1 + kind))
        expected = [int(one.ids[0]) for one in rows]

        def answer(outcome: Outcome) -> None:
            if kind in (0, 1):
                is_right = isinstance(outcome, ValueError if kind == 0 else KeyError)
            else:
                is_right = not isinstance(outcome, Exception) and expected == [
                    result.output for result in outcome
                ]
            with lock:
                outcomes["right" if is_right else "wrong"] += 1
                if outcomes.total() == requests:
                    done.set()
            waiting.release()
            if kind == 2:
                fail()

        assert waiting.acquire(timeout=TIMEOUT_S), "a request was not answered"
        scheduler.submit(rows, answer, lambda: is_cancelled(kind == 3))

    def call(caller: int) -> None:
        chance = random.Random(caller)  # noqa: S311
        for number in range(caller, requests, 16):
            send(chance, number)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert done.wait(TIMEOUT_S), f"{requests - outcomes.total()} requests were not answered"
    scheduler.close()
    return outcomes


def test_no_stranger_gets_an_error_that_is_not_theirs() -> None:
    """Mixed requests, one in fifty wrong: bad rows, bad items, callbacks that raise.
    HALIMEDE_STRANGERS=500000 sends as many.
    """
    requests = int(os.environ.get("HALIMEDE_STRANGERS", "5000"))
    began = time.monotonic()
    outcomes = strangers(requests)
    print(f"{requests:,} requests in {time.monotonic() - began:.0f} s: {dict(outcomes)}")
    assert outcomes == {"right": requests}


FOLDER = version_folder(Settings().repository / f"{MODEL}-tokenizer")
SPEC = spec.load(FOLDER)
TEXTS = ["a cat", "word " * 300, "", "一只猫", "what is the capital of France", "x" * 20_000]


def opened(cache: ResponseCache | None = None) -> SharedEngine:
    """The default model in INT8, run by onnxruntime's own CPU engine as with `device: cpu`."""
    path = version_folder(Settings().repository / f"{MODEL}-int8-onnx") / FILE_NAME
    session = open_session(path, max_tokens=SPEC.max_tokens)[0]
    read = text_rows(text.load(FOLDER, SPEC))

    def make_rows(texts: Sequence[str]) -> Sequence[Row]:
        rows = read(texts)
        wrong = np.full(4, 10**6, np.int64)  # beyond the embedding table
        return [
            Row(wrong, np.ones_like(wrong)) if one == "beyond" else made  # type: ignore[misc]
            for one, made in zip(texts, rows, strict=True)
        ]

    scheduler = Scheduler(
        session.run_together, session.plan, 2, make_rows=make_rows, size_bytes=text_bytes
    )
    return SharedEngine(scheduler, SPEC, cache)


WRONG: dict[str, Callable[[], tuple[list[str], int | None]]] = {
    "beyond the table": lambda: (["a cat", "beyond"], None),
    "dimensions": lambda: (["a cat"], SPEC.dims + 1),
    "utf-8": lambda: (text.decode_all([b"fine", b"\xff"], SPEC), None),
    "too large": lambda: (text.decode_all([b"a" * (SPEC.max_text_bytes + 1)], SPEC), None),
    "input type": lambda: ([SPEC.prompt("s3cret")], None),
}


@pytest.mark.parametrize("cached", [False, True])
def test_no_stranger_gets_an_error_of_the_real_model(cached: bool) -> None:
    """The same with the default model in INT8: 1,000 requests by 8 callers.
    HALIMEDE_STRANGERS_MODEL=20000 sends as many.
    """
    requests = int(os.environ.get("HALIMEDE_STRANGERS_MODEL", "1000"))
    shared = opened(ResponseCache(100_000) if cached else None)
    outcomes, lock = Counter[str](), threading.Lock()

    def outcome_of(texts: list[str], dimensions: int | None) -> object:
        answers: list[object] = []
        answered = threading.Event()

        def answer(result: object) -> None:
            answers.append(result)
            answered.set()

        shared.submit(texts, dimensions, answer)
        assert answered.wait(TIMEOUT_S), "not answered"
        return answers[0]

    def call(caller: int) -> None:
        chance = random.Random(caller)  # noqa: S311
        for _ in range(caller, requests, 8):
            name = chance.choice([*WRONG]) if chance.random() < 1 / 50 else ""
            texts = chance.choices(TEXTS, [8, 1, 4, 8, 8, 1], k=chance.choice([1, 1, 1, 2, 3]))
            try:
                result = outcome_of(*(WRONG[name]() if name else (texts, None)))
            except HalimedeError as error:
                result = error
            if name:
                kind = f"{name}: {type(result).__name__}"
            elif isinstance(result, Exception):
                kind = f"a stranger's {type(result).__name__}"
            else:
                wanted = np.stack([expected[one] for one in texts])
                alike = vectors.cosine(result.vectors, wanted).min() > 0.99  # type: ignore
                kind = "right" if alike else "wrong"
            with lock:
                outcomes[kind] += 1

    expected = {one: outcome_of([one], None).vectors[0] for one in TEXTS}  # type: ignore
    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    shared.close()
    print(f"{requests:,} requests, cached={cached}: {dict(outcomes)}")
    good = outcomes.pop("right")
    assert outcomes.total() + good == requests
    assert {kind.split(":")[0] for kind in outcomes} <= set(WRONG)
    assert not [kind for kind in outcomes if kind.endswith(": Embeddings")]
