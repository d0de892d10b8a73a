"""Rows that arrive at any time, run in the cheapest micro-batches of those that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

from halimede_ops import batch
from halimede_ops.errors import RequestCancelled
from halimede_ops.session import Pixels, Row

WAITING_ROWS = 128
"""Rows that may wait before `wait_for_room` holds the caller back: enough to choose full
micro-batches from, few enough to plan anew for each of them (0.2 ms)."""

LONG_WAIT_RUNS = 16
"""Callers are asked whether they have gone only after so many runs: asking takes time too."""

Outcome = Sequence[Any] | Exception
"""One result a row, in order, or what running them raised."""


class Ran(NamedTuple):
    """One micro-batch that was run."""

    rows: Sequence[Row | Pixels]
    waited_s: float
    """From `submit` until it was taken, of all rows together."""


class ContinuousBatches:
    """Threads that run rows through `run`, each taking a micro-batch as soon as it is free.

    A micro-batch has the row that waited longest, so none starves, and rows of like length beside
    it, whichever request they came with, so little is padded.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Row | Pixels]], Sequence[Any]],
        threads: int,
        tell: Callable[[Ran], None] = lambda ran: None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Threads that wait for rows.

        Args:
            run: gives one result a row.
            threads: micro-batches that are run at the same time.
            tell: hears of each one that was run, from the thread that ran it.
            clock: seconds since any moment; without it, rows are said to have waited 0.
        """
        self._run = run
        self._tell = tell
        self._clock = clock
        self._waiting: list[_Waiting] = []
        """In order of arrival."""
        self._changed = threading.Condition()
        """Guards `_waiting` and `_closed`."""
        self._closed = False
        self._taken = 0
        """Micro-batches until now."""
        self._done: SimpleQueue[tuple[list[_Waiting], Outcome] | None] = SimpleQueue()
        self._running = [threading.Thread(target=self._run_all) for _ in range(threads)]
        # Under load another thread answers, so that those that run lose no time.
        self._answering = threading.Thread(target=self._answer_all)
        for thread in (*self._running, self._answering):
            thread.start()

    def submit(
        self,
        rows: Sequence[Row | Pixels],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Queue the rows of one request; `answer` gets its outcome, once, from another thread.

        Rows whose turn comes late are not run when `is_cancelled`: the outcome is
        RequestCancelled.
        """
        with self._changed:
            request = _Request(rows, answer, is_cancelled, self._taken, self._clock())
            self._waiting += [_Waiting(request, place) for place in range(len(rows))]
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Return as soon as no more than WAITING_ROWS rows wait."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) <= WAITING_ROWS)

    def close(self) -> None:
        """Run and answer what waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._running:
            thread.join()
        self._done.put(None)
        self._answering.join()

    def _run_all(self) -> None:
        while part := self._take():
            taken_at_s = self._clock()
            gone = self._gone({waiting.request for waiting in part})
            wanted = [waiting for waiting in part if waiting.request not in gone]
            if gone:
                dropped = [waiting for waiting in part if waiting.request in gone]
                self._give(dropped, RequestCancelled("the request was cancelled; it was not run."))
            if wanted:
                self._give(wanted, self._outcome(wanted))
                waited_s = sum(taken_at_s - waiting.request.came_at_s for waiting in wanted)
                self._tell(Ran([waiting.row for waiting in wanted], waited_s))

    def _gone(self, requests: set[_Request]) -> set[_Request]:
        """Those that waited long and whose callers have gone."""
        early = self._taken - LONG_WAIT_RUNS
        return {one for one in requests if one.since < early and one.is_cancelled()}

    def _give(self, part: list[_Waiting], outcome: Outcome) -> None:
        if self._waiting:
            self._done.put((part, outcome))
        else:
            _answer(part, outcome)

    def _outcome(self, part: list[_Waiting]) -> Outcome:
        try:
            return self._run([waiting.row for waiting in part])
        except Exception as error:
            return error

    def _take(self) -> list[_Waiting]:
        """The next micro-batch, which then waits no more; empty when closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            parts = batch.plan([waiting.row.length for waiting in self._waiting])
            chosen = next(part for part in parts if 0 in part)
            part = [self._waiting[index] for index in chosen]
            for index in sorted(chosen, reverse=True):
                del self._waiting[index]
            self._taken += 1
            self._changed.notify_all()
            return part

    def _answer_all(self) -> None:
        while done := self._done.get():
            _answer(*done)


def _answer(part: list[_Waiting], outcome: Outcome) -> None:
    for number, (request, place) in enumerate(part):
        if isinstance(outcome, Exception):
            request.fail(outcome)
        else:
            request.put(place, outcome[number])


class _Request:
    """Rows that are answered together."""

    def __init__(
        self,
        rows: Sequence[Row | Pixels],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool],
        since: int,
        came_at_s: float,
    ) -> None:
        self.rows = rows
        self.is_cancelled = is_cancelled
        self.since = since
        """Micro-batches before it came."""
        self.came_at_s = came_at_s
        self._answer = answer
        self._results: list[Any] = [None] * len(rows)
        self._error: Exception | None = None
        self._missing = len(rows)
        self._lock = threading.Lock()

    def put(self, place: int, result: Any) -> None:
        """Keep the result of the row at `place`."""
        self._results[place] = result
        self._count()

    def fail(self, error: Exception) -> None:
        """Keep what one row raised: it is the whole request's answer."""
        self._error = error
        self._count()

    def _count(self) -> None:
        """Answer after the last row."""
        with self._lock:
            self._missing -= 1
            last = not self._missing
        if last:
            self._answer(self._error or self._results)


class _Waiting(NamedTuple):
    """One row of a request."""

    request: _Request
    place: int
    """Of the row in its request."""

    @property
    def row(self) -> Row | Pixels:
        return self.request.rows[self.place]
