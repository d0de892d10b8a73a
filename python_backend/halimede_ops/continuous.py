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
"""Rows that a micro-batch is chosen from: enough for full ones, few enough to plan anew for each of
them (0.2 ms). So many of the interactive lane may wait before `wait_for_room` holds the caller
back."""

WAITING_BULK_ROWS = 256
"""Rows of bulk that may wait before `wait_for_room` holds back who brings them."""

LONG_WAIT_RUNS = 16
"""Callers are asked whether they have gone only after so many runs: asking takes time too."""

Run = Callable[[Sequence[Row | Pixels]], Sequence[Any]]
"""What gives one result a row."""
Plan = Callable[[Sequence[int]], list[list[int]]]
"""What gives the micro-batches, as indices, of rows of these lengths."""
Outcome = Sequence[Any] | Exception
"""One result a row, in order, or what running them raised."""


class Ran(NamedTuple):
    """One micro-batch that was run."""

    rows: Sequence[Row | Pixels]
    waited_s: float
    """From `submit` until it was taken, of all rows together."""


class ContinuousBatches:
    """Threads that run rows through `run`, each taking a micro-batch as soon as it is free.

    A micro-batch has the row that waited longest, so none starves, and those that run best beside
    it, whichever request they came with, so little is padded. Small requests do not wait for bulk:
    while it is run, one more thread runs them, and them alone.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        threads: int,
        tell: Callable[[Ran], None] = lambda ran: None,
        clock: Callable[[], float] = lambda: 0.0,
        run_beside: Run | None = None,
    ) -> None:
        """Threads that wait for rows.

        Args:
            run: gives one result a row.
            plan: gives the micro-batches that cost least.
            threads: micro-batches that are run at the same time; one more while bulk is.
            tell: hears of each one that was run, from the thread that ran it.
            clock: seconds since any moment; without it, rows are said to have waited 0.
            run_beside: runs small requests beside bulk; None: `run`.
        """
        self._plan = plan
        self._tell = tell
        self._clock = clock
        self._waiting: list[_Waiting] = []
        """In order of arrival."""
        lock = threading.Lock()
        """Guards what follows."""
        self._changed = threading.Condition(lock)
        self._urgent = threading.Condition(lock)
        self._closed = False
        self._taken = 0
        """Micro-batches until now."""
        self._bulk_waiting = 0
        """Rows of bulk among those that wait."""
        self._bulk_running = 0
        """Micro-batches with bulk that are run now."""
        self._done: SimpleQueue[tuple[list[_Waiting], Outcome] | None] = SimpleQueue()
        roles = [(self._take, run)] * threads + [(self._take_interactive, run_beside or run)]
        self._running = [threading.Thread(target=self._run_all, args=role) for role in roles]
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
            self._bulk_waiting += len(rows) * request.is_bulk
            self._notify()

    def wait_for_room(self, bulk: bool) -> None:
        """Return as soon as no more rows of this lane wait than may: WAITING_ROWS of the
        interactive one, or WAITING_BULK_ROWS.
        """
        with self._changed:
            if bulk:
                self._changed.wait_for(lambda: self._bulk_waiting <= WAITING_BULK_ROWS)
            else:
                self._changed.wait_for(lambda: self._interactive_waiting() <= WAITING_ROWS)

    def close(self) -> None:
        """Run and answer what waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._notify()
        for thread in self._running:
            thread.join()
        self._done.put(None)
        self._answering.join()

    def _interactive_waiting(self) -> int:
        return len(self._waiting) - self._bulk_waiting

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._closed or (self._bulk_running and self._interactive_waiting()):
            self._urgent.notify()

    def _run_all(self, take: Callable[[], list[_Waiting]], run: Run) -> None:
        while part := take():
            bulk = any(waiting.request.is_bulk for waiting in part)
            taken_at_s = self._clock()
            gone = self._gone({waiting.request for waiting in part})
            wanted = [waiting for waiting in part if waiting.request not in gone]
            if gone:
                dropped = [waiting for waiting in part if waiting.request in gone]
                self._give(dropped, RequestCancelled("the request was cancelled; it was not run."))
            if wanted:
                self._give(wanted, _outcome(wanted, run))
                waited_s = sum(taken_at_s - waiting.request.came_at_s for waiting in wanted)
                self._tell(Ran([waiting.row for waiting in wanted], waited_s))
            with self._changed:
                self._bulk_running -= bulk

    def _gone(self, requests: set[_Request]) -> set[_Request]:
        """Those that waited long and whose callers have gone."""
        early = self._taken - LONG_WAIT_RUNS
        return {one for one in requests if one.since < early and one.is_cancelled()}

    def _give(self, part: list[_Waiting], outcome: Outcome) -> None:
        if self._waiting:
            self._done.put((part, outcome))
        else:
            _answer(part, outcome)

    def _take(self) -> list[_Waiting]:
        """The next micro-batch, which then waits no more; empty when closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._cheapest(range(min(len(self._waiting), WAITING_ROWS)))

    def _take_interactive(self) -> list[_Waiting]:
        """The next micro-batch of the interactive lane, while bulk is run; empty when closed."""
        with self._urgent:
            self._urgent.wait_for(
                lambda: self._closed or (self._bulk_running and self._interactive_waiting())
            )
            if self._closed:  # the other threads run what waits
                return []
            small = [index for index, one in enumerate(self._waiting) if not one.request.is_bulk]
            return self._cheapest(small[:WAITING_ROWS])

    def _cheapest(self, places: Sequence[int]) -> list[_Waiting]:
        """The micro-batch with the first of these places among those that wait, and of the others
        what costs least beside it; empty without places.
        """
        if not places:
            return []
        parts = self._plan([self._waiting[place].row.length for place in places])
        chosen = [places[index] for index in next(part for part in parts if 0 in part)]
        part = [self._waiting[place] for place in chosen]
        for place in sorted(chosen, reverse=True):
            del self._waiting[place]
        bulk = sum(waiting.request.is_bulk for waiting in part)
        self._bulk_waiting -= bulk
        self._bulk_running += bulk > 0
        self._taken += 1
        self._notify()
        return part

    def _answer_all(self) -> None:
        while done := self._done.get():
            _answer(*done)


def _outcome(part: list[_Waiting], run: Run) -> Outcome:
    try:
        return run([waiting.row for waiting in part])
    except Exception as error:
        return error


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
        self.is_bulk = len(rows) > batch.INTERACTIVE_ROWS
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
