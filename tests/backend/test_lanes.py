"""Long and short texts in one scheduler: who waits for whom, what is limited, what is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import MODEL, version_folder, wait_until
from test_scheduler import TIMEOUT_S, Answer, Gate, closing, first_ids, row

from halimede_engine import batching, engine
from halimede_engine.batching import (
    INTERACTIVE_BYTES,
    INTERACTIVE_TOKENS,
    SHORT_TOKENS,
    URGENT_TOKENS,
)
from halimede_engine.engine import SharedEngine, text_bytes, text_rows
from halimede_engine.requests import READ_BYTES
from halimede_engine.scheduler import Scheduler
from halimede_engine.session import FILE_NAME, Row, open_session
from halimede_ops import spec, text
from halimede_ops.errors import RequestCancelled, ServerOverloaded
from halimede_tools.settings import Settings

LARGE = "x" * (INTERACTIVE_BYTES + 1)


def lengths_of(texts: Sequence[str]) -> list[Row]:
    """A row of one token for each text; its id is the text's length."""
    return [row(1, len(one)) for one in texts]


class Reader:
    """Makes rows; those of large texts once it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.large = 0

    def __call__(self, texts: Sequence[str]) -> list[Row]:
        if any(len(one) > INTERACTIVE_BYTES for one in texts):
            self.large += len(texts)
            self.entered.set()
            assert self.opened.wait(TIMEOUT_S)
        return lengths_of(texts)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("large_texts", [1, 8])
def test_a_short_text_does_not_wait_for_the_reading_of_long_ones(
    threads: int, large_texts: int
) -> None:
    """However many requests of few but long texts are read: what is bulk is decided by bytes."""
    reader = Reader()
    scheduler = Scheduler(
        first_ids, batching.plan, threads, make_rows=reader, size_bytes=text_bytes
    )
    with closing(scheduler):
        long = [Answer() for _ in range(8)]
        for answer in long:
            scheduler.submit([LARGE] * large_texts, answer)
        assert reader.entered.wait(TIMEOUT_S)
        for number in range(1, 20):
            short = Answer()
            scheduler.submit(["s" * number], short)
            assert short.wait() == [number]
        assert scheduler.run_now([LARGE]) is None
        reader.opened.set()
        assert [answer.wait() for answer in long] == [[len(LARGE)] * large_texts] * 8


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "lengths",
    [[SHORT_TOKENS + 1], [200] * 8, [INTERACTIVE_TOKENS + 1], [5] * 100],
    ids=["a text", "8 texts", "many tokens", "many rows"],
)
def test_a_short_text_does_not_wait_for_longer_runs(threads: int, lengths: list[int]) -> None:
    """While every run thread runs longer rows, and more of them wait, short requests are run; no
    longer row is beside theirs.
    """
    gate = Gate()
    beside: list[list[int]] = []

    def run(rows: Sequence[Row]) -> list[int]:
        if any(one.ids[0] == 7 for one in rows):
            beside.append([one.length for one in rows])
            return first_ids(rows)
        return gate.run(rows)

    with closing(Scheduler(run, batching.plan, threads)) as scheduler:
        long = [Answer() for _ in range(6)]
        for answer in long:
            scheduler.submit([row(length, 1) for length in lengths], answer)
        wait_until(lambda: scheduler._running == threads and len(gate.parts) == threads)
        for _ in range(10):
            short = Answer()
            scheduler.submit([row(16, 7)], short)
            assert short.wait() == [7]
        gate.opened.set()
        assert [answer.wait() for answer in long] == [[1] * len(lengths)] * 6
    assert beside == [[16]] * 10


@pytest.mark.parametrize("threads", [1, 2])
def test_a_longer_text_does_not_wait_for_bulk(threads: int) -> None:
    """While every run thread runs bulk, single texts of up to URGENT_TOKENS are run, one at a time
    and after the short ones.
    """
    gate = Gate()
    runs: list[list[int]] = []

    def run(rows: Sequence[Row]) -> list[int]:
        if rows[0].ids[0] == 1:
            return gate.run(rows)
        runs.append([int(one.ids[0]) for one in rows])
        return first_ids(rows)

    with closing(Scheduler(run, batching.plan, threads)) as scheduler:
        scheduler.submit([row(200, 1)] * 100, Answer())
        wait_until(lambda: len(gate.parts) == threads)
        with scheduler._lock:  # all of them wait before one is run
            answers = [Answer() for _ in range(3)]
            for answer, waiting in zip(
                answers, (row(URGENT_TOKENS, 2), row(65, 3), row(16, 4)), strict=True
            ):
                scheduler.submit([waiting], answer)
        assert [answer.wait() for answer in answers] == [[2], [3], [4]]
        gate.opened.set()
    assert runs == [[4], [2], [3]]


def test_interactive_rows_take_turns_with_bulk() -> None:
    """A request of middle size waits for a few runs of the bulk before it, not for all of them."""
    gate = Gate()
    with closing(Scheduler(gate.run, batching.plan, threads=1)) as scheduler:
        for _ in range(3):
            scheduler.submit([row(256, 1)] * 40, Answer())
        assert gate.entered.wait(TIMEOUT_S)
        middle = Answer()
        scheduler.submit([row(URGENT_TOKENS + 1, 2)], middle)
        gate.opened.set()
        assert middle.wait() == [2]
    assert next(i for i, part in enumerate(gate.parts) if URGENT_TOKENS + 1 in part) < 5


def test_a_request_becomes_bulk_by_its_tokens() -> None:
    """Rows show what bytes did not: the request counts in the lane of bulk from then on."""
    gate = Gate()
    with closing(Scheduler(gate.run, batching.plan, threads=1, max_requests=1)) as scheduler:
        scheduler.submit([row(INTERACTIVE_TOKENS + 1, 1)], Answer())
        assert gate.entered.wait(TIMEOUT_S)
        scheduler.submit([row(16)], Answer())
        with pytest.raises(ServerOverloaded):
            scheduler.submit([row(16)] * 9, Answer())
        gate.opened.set()


def test_the_bytes_that_wait_are_limited() -> None:
    """Bulk beyond the limit is refused with the three sizes; short texts are not, and answers make
    room.
    """
    reader, answer = Reader(), Answer()
    scheduler = Scheduler(
        first_ids,
        batching.plan,
        1,
        make_rows=reader,
        size_bytes=text_bytes,
        max_bulk_bytes=3 * len(LARGE),
    )
    with closing(scheduler):
        scheduler.submit([LARGE, LARGE], answer)
        with pytest.raises(
            ServerOverloaded, match=r"32,770 bytes wait .* has 32,770; .* takes 49,155\. Send again"
        ):
            scheduler.submit([LARGE, LARGE], Answer())
        short = Answer()
        scheduler.submit(["a"], short)
        assert short.wait() == [1]
        reader.opened.set()
        answer.wait()
        scheduler.submit([LARGE, LARGE, LARGE], Answer())


def test_bulk_whose_caller_has_gone_is_not_read() -> None:
    """Neither at all if the caller had gone before, nor further once it goes."""
    reader, gone = Reader(), threading.Event()
    answers = [Answer() for _ in range(3)]
    item = "x" * READ_BYTES
    scheduler = Scheduler(first_ids, batching.plan, 1, make_rows=reader, size_bytes=text_bytes)
    with closing(scheduler):
        scheduler.submit([item] * 8, answers[0], gone.is_set)
        assert reader.entered.wait(TIMEOUT_S)
        scheduler.submit([item] * 8, answers[1], gone.is_set)
        scheduler.submit([item] * 2, answers[2])
        gone.set()
        reader.opened.set()
        assert all(isinstance(answer.wait(), RequestCancelled) for answer in answers[:2])
        assert answers[2].wait() == [READ_BYTES] * 2
    assert reader.large == 1 + 2


def test_bulk_whose_caller_goes_is_not_run_further() -> None:
    """It is checked between its micro-batches; its other rows leave the queue at once."""
    gate, gone, answer = Gate(), threading.Event(), Answer()
    with closing(Scheduler(gate.run, batching.plan, threads=1)) as scheduler:
        scheduler.submit([row(256)] * 64, answer, gone.is_set)
        assert gate.entered.wait(TIMEOUT_S)
        gone.set()
        gate.opened.set()
        assert isinstance(answer.wait(), RequestCancelled)
        assert not scheduler._rows
    assert len(gate.parts) == 1


def test_texts_do_not_stay_in_memory_once_they_are_rows() -> None:
    """A request that waits for its run holds its rows alone."""
    gate = Gate()
    texts: list[list[str]] = []

    def rows_of(items: Sequence[str]) -> list[Row]:
        return lengths_of(items)

    scheduler = Scheduler(gate.run, batching.plan, 1, make_rows=rows_of, size_bytes=text_bytes)
    with closing(scheduler):
        for items in (["a"], ["b"] * 9):
            texts.append(items)
            scheduler.submit(items, Answer())
            assert gate.entered.wait(TIMEOUT_S)
        wait_until(lambda: len(scheduler._rows) > 0)
        unanswered = [*scheduler._unanswered[True], *scheduler._unanswered[False]]
        assert [request.items for request in unanswered] == [(), ()]
        gate.opened.set()


@pytest.fixture(scope="module")
def shared() -> SharedEngine:
    """The default model in INT8, as the backend opens it."""
    repository = Settings().repository
    folder = version_folder(repository / f"{MODEL}-tokenizer")
    facts = spec.load(folder)
    path = version_folder(repository / f"{MODEL}-int8-onnx") / FILE_NAME
    session = open_session(path, max_tokens=facts.max_tokens)[0]
    lone = open_session(path, max_tokens=facts.max_tokens)[0]
    scheduler = Scheduler(
        session.run_together,
        session.plan,
        1,
        make_rows=text_rows(text.load(folder, facts)),
        run_alone=lone.run_together,
        size_bytes=text_bytes,
        reader_niceness=5,
    )
    return SharedEngine(scheduler, facts)


def latencies_s(shared: SharedEngine, seconds: float) -> list[float]:
    """Of one short text after the other."""
    latencies = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer, began = threading.Event(), time.monotonic()
        shared.submit(["what is the capital of France"], None, lambda _, done=answer: done.set())
        assert answer.wait(TIMEOUT_S)
        latencies.append(time.monotonic() - began)
        time.sleep(0.002)
    return latencies


def test_a_short_text_beside_texts_of_4_mb(shared: SharedEngine) -> None:
    """Two callers with 8 MiB each without end: the p90 of a short text stays within 10 times its
    own. They held it up for 46 s; `p99 within 3 times` is measured on an idle machine only.
    """
    stopped = threading.Event()
    big = "word " * 800_000

    def load() -> None:
        while not stopped.is_set():
            answered = threading.Event()
            shared.submit([big, big], None, lambda _, done=answered: done.set())
            assert answered.wait(TIMEOUT_S)

    latencies_s(shared, 1)
    alone_s = np.percentile(latencies_s(shared, 2), 90)
    callers = [threading.Thread(target=load) for _ in range(2)]
    for caller in callers:
        caller.start()
    beside_s = np.percentile(latencies_s(shared, 2), 90)
    stopped.set()
    for caller in callers:
        caller.join(TIMEOUT_S)
    print(f"p90 alone {alone_s * 1000:.1f} ms, beside {beside_s * 1000:.1f} ms")
    assert beside_s < 10 * alone_s + 0.05


def test_texts_that_cannot_be_cut_are_tokenized_one_at_a_time() -> None:
    """Two threads never hold the memory of two of them."""
    at_work = highest = 0
    lock = threading.Lock()

    class Slow:
        def encode_prompted(self, texts: Sequence[str]) -> list[text.Tokens]:
            nonlocal at_work, highest
            with lock:
                at_work += 1
                highest = max(highest, at_work)
            time.sleep(0.05)
            with lock:
                at_work -= 1
            return [text.Tokens([1], 1) for _ in texts]

    rows = text_rows(Slow())  # type: ignore[arg-type]
    large = ["x" * (engine.LARGE_CHARACTERS + 1)]
    threads = [threading.Thread(target=rows, args=(large,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert highest == 1
