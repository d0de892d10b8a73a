"""Items that arrive at any time, read and run in the cheapest micro-batches of those that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from halimede_engine import batching
from halimede_ops.errors import RequestCancelled, ServerOverloaded

WAITING_ROWS = 128
"""Rows that a micro-batch is chosen from: enough for full ones, few enough to plan anew for each of
them (0.2 ms). So many items of the interactive lane may wait before `wait_for_room` holds the
caller back."""

WAITING_BULK = 256
"""Items of bulk that may wait before `wait_for_room` holds back who brings them: a picture's row
has 150 kB."""

GATHER_S = 0.001
"""While every thread is busy, `gather` takes so long: what comes meanwhile is brought together,
which costs less than one by one."""

LONG_WAIT_RUNS = 16
"""Callers are asked whether they have gone only after so many runs, unless that costs nothing: a
message to Triton takes time too."""


class Row(Protocol):
    """What an item is read to."""

    @property
    def length(self) -> int:
        """Tokens that running it costs."""


Read = Callable[[Sequence[Any]], Sequence[Row]]
"""What gives one row an item."""
Run = Callable[[Sequence[Any]], Sequence[Any]]
"""What gives one result a row."""
Plan = Callable[[Sequence[int], int], list[list[int]]]
"""What gives the micro-batches, as indices, of rows of these lengths for so many free threads."""


class Done(NamedTuple):
    """One item that was run."""

    row: Any
    """What it was read to."""
    result: Any
    """What running that gave."""


Outcome = Sequence[Done] | Exception
"""One Done an item, in order, or what reading or running them raised."""


_Results = Sequence[Any] | Exception
"""One result a row of a micro-batch, in order, or what running it raised."""


class Ran(NamedTuple):
    """One micro-batch that was run."""

    rows: Sequence[Any]
    waited_s: float
    """From `submit` until it was taken, of all rows together."""


class ContinuousBatches:
    """Threads that read items, as many as have come, and run their rows, each taking a micro-batch
    as soon as it is free.

    A micro-batch has the row that waited longest, so none starves, and those that run best beside
    it, whichever request they came with, so little is padded. Small requests do not wait for bulk:
    while it is read or run, one more thread does that for them, and for them alone.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        threads: int,
        read: Read = list,
        tell: Callable[[Ran], None] = lambda ran: None,
        clock: Callable[[], float] = lambda: 0.0,
        run_alone: Run | None = None,
        most_requests: int | None = None,
        long_wait_runs: int = LONG_WAIT_RUNS,
    ) -> None:
        """Threads that wait for items.

        Args:
            run: gives one result a row.
            plan: gives the micro-batches that cost least.
            threads: micro-batches that are run at the same time; one more while bulk is.
            read: gives one row an item; without it, items are rows.
            tell: hears of each micro-batch that was run, from the thread that ran it.
            clock: seconds since any moment; without it, rows are said to have waited 0.
            run_alone: runs a micro-batch while no other is, and small requests beside bulk; None:
                `run`.
            most_requests: small ones, and as many of bulk, that may be unanswered.
            long_wait_runs: micro-batches until a request's caller is asked whether it has gone.
        """
        self._run = run
        self._run_alone = run_alone or run
        self._plan = plan
        self._threads = threads
        self._read = read
        self._tell = tell
        self._clock = clock
        self._most_requests = most_requests
        self._long_wait_runs = long_wait_runs
        self._unread: list[_Request] = []
        """In order of arrival, as what follows."""
        self._waiting: list[_Waiting] = []
        self._planned: list[list[_Waiting]] = []
        """Micro-batches of all that wait, the one whose turn it is first; or none."""
        self._lock = threading.Lock()
        """Guards all that changes."""
        self._work = threading.Condition(self._lock)
        self._urgent = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._taken = 0
        """Micro-batches until now."""
        self._free = 0
        """Threads that wait for work."""
        self._unanswered = {True: 0, False: 0}
        """Requests of bulk, and small ones."""
        self._bulk_waiting = 0
        """Rows of bulk among those that wait."""
        self._bulk_running = 0
        """Threads that read or run bulk now."""
        self._done: SimpleQueue[tuple[list[_Waiting], _Results] | None] = SimpleQueue()
        loops = [self._serve] * threads + [self._serve_small]
        self._running = [threading.Thread(target=loop, daemon=True) for loop in loops]
        # Under load another thread answers, so that those that run lose no time.
        self._answering = threading.Thread(target=self._answer_all, daemon=True)
        for thread in (*self._running, self._answering):
            thread.start()

    def submit(
        self,
        items: Sequence[Any],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Queue the items of one request; `answer` gets its outcome, once, from another thread.

        Rows whose turn comes late are not run when `is_cancelled`: the outcome is
        RequestCancelled.

        Raises:
            ServerOverloaded: as many requests as may be are unanswered.
        """
        request = _Request(items, answer, is_cancelled, self._taken, self._clock())
        with self._lock:
            if self._unanswered[request.is_bulk] == self._most_requests:
                raise ServerOverloaded(
                    f"the queue is full: {self._most_requests:,} requests wait. Send again."
                )
            self._unanswered[request.is_bulk] += 1
            self._unread.append(request)
            self._wake()

    def gather(self) -> None:
        """While every thread is busy, return only when some more requests may have come."""
        with self._lock:
            if not self._free and not self._bulk_running:
                self._room.wait(GATHER_S)

    def wait_for_room(self) -> None:
        """Return when no more items of either lane wait than may."""
        with self._lock:
            self._room.wait_for(self._has_room)

    def close(self) -> None:
        """Run and answer what waits, then end the threads, which do not keep a program from its
        end.
        """
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._urgent.notify()
        for thread in self._running:
            thread.join()
        self._done.put(None)
        self._answering.join()

    def _has_room(self) -> bool:
        unread = sum(len(one.items) for one in self._unread)
        bulk = sum(len(one.items) for one in self._unread if one.is_bulk)
        return (
            bulk + self._bulk_waiting <= WAITING_BULK
            and unread - bulk + self._small_waiting() <= WAITING_ROWS
        )

    def _small_waiting(self) -> int:
        return len(self._waiting) - self._bulk_waiting

    def _is_urgent(self) -> bool:
        """Whether small requests would wait for bulk."""
        return self._bulk_running > 0 and (
            self._small_waiting() > 0 or any(not one.is_bulk for one in self._unread)
        )

    def _wake(self) -> None:
        """Wake a thread for what waits; it wakes the next for what it leaves."""
        if self._waiting or self._unread:
            self._work.notify()
        if self._is_urgent():
            self._urgent.notify()

    def _serve(self) -> None:
        while self._work_came():
            self._read_all(self._next_unread())
            self._run_part(self._next_part())

    def _serve_small(self) -> None:
        while self._urgent_came():
            self._read_all(self._small_unread())
            self._run_part(self._small_part())

    def _work_came(self) -> bool:
        """Wait for something to read or to run; False when closed and nothing is left."""
        with self._lock:
            self._free += 1
            self._room.notify_all()
            self._work.wait_for(lambda: self._waiting or self._unread or self._closed)
            self._free -= 1
            return bool(self._waiting or self._unread)

    def _urgent_came(self) -> bool:
        """Wait until small requests would wait for bulk; False when closed."""
        with self._lock:
            self._urgent.wait_for(lambda: self._closed or self._is_urgent())
            return not self._closed  # then the other threads run what waits

    def _next_unread(self) -> list[_Request]:
        """The requests to read next: every small one, or when its turn has come one of bulk."""
        with self._lock:
            if self._unread and self._unread[0].is_bulk and len(self._waiting) < WAITING_ROWS:
                self._bulk_running += 1
                requests = [self._unread.pop(0)]
            else:
                requests = self._take_small()
            self._wake()
            return requests

    def _small_unread(self) -> list[_Request]:
        with self._lock:
            return self._take_small()

    def _take_small(self) -> list[_Request]:
        small = [one for one in self._unread if not one.is_bulk][:WAITING_ROWS]
        taken = set(small)
        self._unread = [one for one in self._unread if one not in taken]
        return small

    def _read_all(self, requests: Sequence[_Request]) -> None:
        """Read what these requests have; then their rows wait. No other thread is woken: this one
        takes of them what it runs, and wakes the next for the rest.
        """
        if not requests:
            return
        rows = self._rows_of(requests)
        with self._lock:
            self._waiting += rows
            self._planned = []
            self._bulk_waiting += sum(one.request.is_bulk for one in rows)
            self._bulk_running -= requests[0].is_bulk

    def _rows_of(self, requests: Sequence[_Request]) -> list[_Waiting]:
        """The rows of these requests, read together; one that cannot be read fails alone."""
        try:
            rows = iter(self._read([item for one in requests for item in one.items]))
            return [
                _Waiting(one, place, next(rows))
                for one in requests
                for place in range(len(one.items))
            ]
        except Exception as error:
            if len(requests) > 1:
                return [row for one in requests for row in self._rows_of([one])]
            self._finish(requests[0], error)
            return []

    def _next_part(self) -> _Part:
        with self._lock:
            part = self._cheapest(self._waiting[:WAITING_ROWS])
            rest = self._waiting or self._unread or self._free < self._threads - 1
            return _Part(part, self._run if rest else self._run_alone)

    def _small_part(self) -> _Part:
        with self._lock:
            small = [one for one in self._waiting if not one.request.is_bulk]
            self._planned = []
            return _Part(self._cheapest(small[:WAITING_ROWS]), self._run_alone)

    def _cheapest(self, waiting: Sequence[_Waiting]) -> list[_Waiting]:
        """The micro-batch with the first of these rows, and of the others what costs least beside
        it, which then wait no more; empty without rows.
        """
        if not waiting:
            return []
        if not self._planned:
            lengths = [one.row.length for one in waiting]
            parts = sorted(self._plan(lengths, 1 + self._free), key=min)
            self._planned = [[waiting[index] for index in part] for part in parts]
        part, *others = self._planned
        taken = set(map(id, part))
        self._waiting = [one for one in self._waiting if id(one) not in taken]
        # A plan of all that wait is good until more come.
        self._planned = others if sum(map(len, others)) == len(self._waiting) else []
        bulk = sum(one.request.is_bulk for one in part)
        self._bulk_waiting -= bulk
        self._bulk_running += bulk > 0
        self._taken += 1
        self._room.notify_all()
        self._wake()
        return part

    def _run_part(self, part: _Part) -> None:
        if not part.rows:
            return
        taken_at_s = self._clock()
        gone = self._gone({waiting.request for waiting in part.rows})
        wanted = [waiting for waiting in part.rows if waiting.request not in gone]
        if gone:
            dropped = [waiting for waiting in part.rows if waiting.request in gone]
            self._give(dropped, RequestCancelled("the request was cancelled; it was not run."))
        if wanted:
            rows = [waiting.row for waiting in wanted]
            self._give(wanted, _results(rows, part.run))
            waited_s = sum(taken_at_s - waiting.request.came_at_s for waiting in wanted)
            self._tell(Ran(rows, waited_s))
        with self._lock:
            self._bulk_running -= any(waiting.request.is_bulk for waiting in part.rows)

    def _gone(self, requests: set[_Request]) -> set[_Request]:
        """Those that waited long and whose callers have gone."""
        early = self._taken - self._long_wait_runs
        return {one for one in requests if one.since < early and one.is_cancelled()}

    def _give(self, part: list[_Waiting], results: _Results) -> None:
        if self._waiting or self._unread:
            self._done.put((part, results))
        else:
            self._answer(part, results)

    def _answer_all(self) -> None:
        while done := self._done.get():
            self._answer(*done)

    def _answer(self, part: list[_Waiting], results: _Results) -> None:
        for number, (request, place, row) in enumerate(part):
            done = results if isinstance(results, Exception) else Done(row, results[number])
            if request.put(place, done):
                self._finish(request, request.outcome())

    def _finish(self, request: _Request, outcome: Outcome) -> None:
        with self._lock:
            self._unanswered[request.is_bulk] -= 1
        request.answer(outcome)


def _results(rows: list[Any], run: Run) -> _Results:
    try:
        return run(rows)
    except Exception as error:
        return error


class _Request:
    """Items that are answered together."""

    def __init__(
        self,
        items: Sequence[Any],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool],
        since: int,
        came_at_s: float,
    ) -> None:
        self.items = items
        self.is_bulk = len(items) > batching.INTERACTIVE_ROWS
        self.is_cancelled = is_cancelled
        self.since = since
        """Micro-batches before it came."""
        self.came_at_s = came_at_s
        self.answer = answer
        self._done: list[Any] = [None] * len(items)
        self._error: Exception | None = None
        self._missing = len(items)
        self._lock = threading.Lock()

    def put(self, place: int, done: Done | Exception) -> bool:
        """Keep what the item at `place` gave; whether it was the last that was missing."""
        if isinstance(done, Exception):
            self._error = done
        self._done[place] = done
        with self._lock:
            self._missing -= 1
            return not self._missing

    def outcome(self) -> Outcome:
        """What every item gave, or what one raised."""
        return self._error or self._done


class _Waiting(NamedTuple):
    """One row of a request."""

    request: _Request
    place: int
    """Of its item in the request."""
    row: Any


class _Part(NamedTuple):
    """A micro-batch and what runs it; there may be none."""

    rows: list[_Waiting]
    run: Run
