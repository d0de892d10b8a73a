"""Continuous batching: runs the rows of many requests together, in the cheapest micro-batches.

            submit                  make_rows                plan, run              answer
    request ──────> queued request ──────────> queued rows ──────────> micro-batch ──────> caller

A request with more than INTERACTIVE_ROWS items is bulk, any other is interactive. Each of the two
lanes has its own limits. `threads` threads serve both lanes; one more serves interactive requests
while bulk runs. They start with the first `submit`.

`run_now` runs an interactive request in the caller's thread instead, while nothing else runs.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from halimede_engine import batching
from halimede_ops.errors import RequestCancelled, ServerOverloaded

QUEUED_ROWS = 128
"""Rows from which a micro-batch is chosen: enough to fill one, few enough to plan again for each
(0.2 ms). `wait_for_room` blocks while more interactive items are queued."""

QUEUED_BULK_ROWS = 256
"""`wait_for_room` blocks while more bulk items are queued: the row of an image has 150 kB."""

GATHER_S = 0.001
"""Maximum duration of `gather`: requests that are read together cost less than one by one."""

CANCEL_CHECK_RUNS = 16
"""Micro-batches that run before a request is checked for cancellation. The check is a message to
Triton, which takes time too."""


EXIT_WAIT_S = 10.0
"""Maximum time that the end of a program waits for runs under way: a daemon thread that is ended
inside onnxruntime aborts the process."""


class Row(Protocol):
    """An item in the form that the model runs."""

    @property
    def length(self) -> int:
        """Cost of running the row, in tokens."""


MakeRows = Callable[[Sequence[Any]], Sequence[Row]]
"""Makes one row of each item, in order."""
Run = Callable[[Sequence[Any]], Sequence[Any] | np.ndarray]
"""Runs one micro-batch: one output for each row, in order."""
Plan = Callable[[Sequence[int], int], list[list[int]]]
"""Splits rows of these lengths into micro-batches of indices, for a number of free threads."""


class ItemResult(NamedTuple):
    """The result of one item."""

    row: Any
    """The row that `make_rows` made of the item."""
    output: Any
    """What `run` returned for the row."""


Outcome = Sequence[ItemResult] | Exception
"""One result for each item of a request, in order, or the exception that the request ended with."""


_Outputs = Sequence[Any] | np.ndarray | Exception
"""One output for each row of a micro-batch, in order, or the exception that running it raised."""


_Delivered = tuple[list["_QueuedRow"], _Outputs]


class CompletedRun(NamedTuple):
    """A micro-batch after its run."""

    rows: Sequence[Any]
    queued_s: float
    """Seconds between `submit` and the run, added up over all rows."""


class Scheduler:
    """Threads that turn queued requests into rows and run the rows in micro-batches.

    A thread that becomes free takes the micro-batch of the row that is queued longest, so no row
    starves. The other rows of the micro-batch are those that cost least beside it, from any
    request, so there is little padding. Interactive requests do not wait for bulk: while bulk is
    read or run, one more thread serves interactive requests alone.

    Args:
        run: runs one micro-batch.
        plan: splits the queued rows into micro-batches.
        threads: maximum number of micro-batches that run at the same time, those of `run_now`
            included, besides the one more for interactive requests.
        make_rows: makes one row of each item; by default the items are rows.
        run_alone: runs a micro-batch while no other runs, and interactive requests beside bulk; by
            default `run`.
        on_run: called after each run, in the thread that ran it.
        clock: time in seconds, for `CompletedRun.queued_s`; without it that is 0.
        max_requests: maximum number of unanswered requests in each lane.
        cancel_check_runs: micro-batches that run before a request is checked for cancellation.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        threads: int,
        *,
        make_rows: MakeRows = list,
        run_alone: Run | None = None,
        on_run: Callable[[CompletedRun], None] = lambda completed: None,
        clock: Callable[[], float] = lambda: 0.0,
        max_requests: int | None = None,
        cancel_check_runs: int = CANCEL_CHECK_RUNS,
    ) -> None:
        self._run = run
        self._run_alone = run_alone or run
        self._plan = plan
        self._threads = threads
        self._make_rows = make_rows
        self._on_run = on_run
        self._clock = clock
        self._max_requests = max_requests
        self._cancel_check_runs = cancel_check_runs
        self._lock = threading.RLock()
        """Guards all attributes below, except `_closed` and `_answers`. Reentrant, so that `close`
        can find out whether the garbage collector called it while this thread held the lock."""
        self._work_queued = threading.Condition(self._lock)
        self._urgent_queued = threading.Condition(self._lock)
        self._room_changed = threading.Condition(self._lock)
        self._requests: list[_Request] = []
        """Requests without rows yet, in order of arrival."""
        self._rows: list[_QueuedRow] = []
        """Rows that wait to run, in order of arrival."""
        self._planned: list[list[_QueuedRow]] = []
        """The micro-batches of all `_rows`, in the order they run; empty: not planned yet."""
        self._closed = False
        self._runs_started = 0
        self._urgent_runs = False  # whether the thread for interactive requests beside bulk works
        self._running = 0
        """Threads, callers of `run_now` included, that read or run, besides the interactive one."""
        self._unanswered = {True: 0, False: 0}
        """Unanswered requests by `is_bulk`."""
        self._bulk_rows = 0
        """Bulk rows among `_rows`."""
        self._bulk_threads = 0
        """Threads that read or run bulk."""
        self._answers: queue.SimpleQueue[_Delivered | None] = queue.SimpleQueue()
        self._run_threads: list[threading.Thread] = []
        self._answer_thread: threading.Thread | None = None
        self._pid = os.getpid()
        _SCHEDULERS.add(self)

    def run_now(
        self, items: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any] | np.ndarray] | None:
        """Run an interactive request in the caller's thread: its rows and their outputs, in order.

        None if the request is bulk or others are queued or run: `submit` runs it together with
        those.

        Raises:
            Exception: what `make_rows` or `run_alone` raised.
        """
        if len(items) > batching.INTERACTIVE_ROWS:
            return None
        with self._lock:
            if self._running or self._requests or self._rows or self._bulk_threads or self._closed:
                return None
            self._running += 1
            self._runs_started += 1
        try:
            rows = self._make_rows(items)
            outputs = self._run_alone(rows)
        finally:
            self._end_turn()
        self._on_run(CompletedRun(rows, 0.0))
        return rows, outputs

    def submit(
        self,
        items: Sequence[Any],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Queue the items of one request.

        `answer` is called once with the outcome, in another thread. If `is_cancelled` returns
        True after a long wait, the rows do not run and the outcome is RequestCancelled.

        Raises:
            ServerOverloaded: `max_requests` requests of this lane are unanswered.
            RequestCancelled: the scheduler is closed.
        """
        request = _Request(items, answer, is_cancelled, self._runs_started, self._clock())
        with self._lock:
            if self._closed:
                raise RequestCancelled("the engine is closed; the request was not run.")
            if self._unanswered[request.is_bulk] == self._max_requests:
                raise ServerOverloaded(
                    f"the queue is full: {self._max_requests:,} requests wait. Send again."
                )
            self._unanswered[request.is_bulk] += 1
            self._requests.append(request)
            has_threads = self._answer_thread is not None or self._start_threads()
            self._wake()
        if not has_threads:
            self._serve_here()

    def gather(self) -> None:
        """Wait up to GATHER_S for more requests, if every thread is busy with interactive ones."""
        with self._lock:
            if self._running == self._threads and not self._bulk_threads:
                self._room_changed.wait(GATHER_S)

    def wait_for_room(self) -> None:
        """Block while either lane has more queued items than its limit."""
        with self._lock:
            self._room_changed.wait_for(self._has_room)

    def stop(self) -> None:
        """Let the threads answer all queued requests and end; do not wait for them.

        Takes no lock, so a finaliser may call it in whatever thread the garbage collector runs.
        """
        self._closed = True
        self._answers.put(None)  # reentrant, by its documentation

    def close(self) -> None:
        """Answer all queued requests, then stop the threads. Return when they have ended.

        Called by the garbage collector in one of these threads, or in one that holds the lock, it
        returns at once. The threads are daemons: a program may exit without calling this.
        """
        self.stop()
        own = [*self._run_threads, self._answer_thread]
        is_within = threading.current_thread() in own or self._lock._is_owned()  # type: ignore[attr-defined]
        if self._answer_thread is not None and not is_within:
            self._answer_thread.join()

    def settle(self) -> None:
        """Drop all queued requests unanswered, and wait for the runs under way.

        It is for the end of a program: a handler that is called later may still send requests.
        """

        def is_settled() -> bool:
            self._requests, self._rows, self._planned, self._bulk_rows = [], [], [], 0
            return not (self._running or self._urgent_runs)

        if self._pid == os.getpid():  # a forked child has none of the threads
            with self._lock:
                self._room_changed.wait_for(is_settled, EXIT_WAIT_S)

    def _start_threads(self) -> bool:
        """Start all threads; False where none can be started: the interpreter is shutting down."""
        loops = [(self._serve, "run")] * self._threads + [(self._serve_interactive, "interactive")]
        run_threads = [
            threading.Thread(target=loop, name=f"engine-{name}", daemon=True)
            for loop, name in loops
        ]
        # Under load another thread answers, so that running threads lose no time.
        answer_thread = threading.Thread(
            target=self._answer_queued, name="engine-answer", daemon=True
        )
        try:
            for thread in (*run_threads, answer_thread):
                thread.start()
        except RuntimeError:
            return False
        self._run_threads, self._answer_thread = run_threads, answer_thread
        return True

    def _has_room(self) -> bool:
        unread = sum(len(request.items) for request in self._requests)
        unread_bulk = sum(len(request.items) for request in self._requests if request.is_bulk)
        return (
            unread_bulk + self._bulk_rows <= QUEUED_BULK_ROWS
            and unread - unread_bulk + self._interactive_rows() <= QUEUED_ROWS
        )

    def _interactive_rows(self) -> int:
        return len(self._rows) - self._bulk_rows

    def _is_urgent(self) -> bool:
        """Whether interactive requests are queued behind bulk that is read or run."""
        return self._bulk_threads > 0 and (
            self._interactive_rows() > 0 or any(not request.is_bulk for request in self._requests)
        )

    def _wake(self) -> None:
        """Wake one thread for the queued work; it wakes the next for what it leaves."""
        if self._rows or self._requests:
            self._work_queued.notify()
        if self._is_urgent():
            self._urgent_queued.notify()

    def _serve(self) -> None:
        # No name here is bound to requests: while the thread waits they would keep their engine.
        while self._take_turn(self._wait_for_work()):
            pass

    def _take_turn(self, requests: Sequence[_Request] | None) -> bool:
        """Run the next micro-batch, once these requests are queued; False if there are none."""
        if requests is None:
            return False
        self._run_micro_batch(self._micro_batch(requests, self._next_micro_batch))
        self._end_turn()
        return True

    def _serve_here(self) -> None:
        """Answer all queued requests in the caller's thread."""
        while self._rows or self._requests:
            with self._lock:
                self._running += 1
                requests = self._next_requests()
            self._take_turn(requests)
        while not self._answers.empty():
            self._answer_next()

    def _serve_interactive(self) -> None:
        while self._wait_for_urgent_work():
            self._run_micro_batch(
                self._micro_batch(
                    self._next_interactive_requests(), self._next_interactive_micro_batch
                )
            )
            with self._lock:
                self._urgent_runs = False
                self._room_changed.notify_all()

    def _wait_for_work(self) -> list[_Request] | None:
        """Block until something is queued and may run; return the requests to make rows of, perhaps
        none. None if closed and nothing is left.
        """
        with self._lock:
            self._work_queued.wait_for(lambda: self._may_run() or self._has_ended())
            if self._has_ended():
                return None
            self._running += 1
            return self._next_requests()

    def _may_run(self) -> bool:
        return self._running < self._threads and bool(self._rows or self._requests)

    def _has_ended(self) -> bool:
        return self._closed and not (self._rows or self._requests)

    def _end_turn(self) -> None:
        with self._lock:
            self._running -= 1
            self._room_changed.notify_all()
            self._wake()

    def _wait_for_urgent_work(self) -> bool:
        """Block until `_is_urgent`; False if closed."""
        with self._lock:
            self._urgent_queued.wait_for(lambda: self._closed or self._is_urgent())
            self._urgent_runs = not self._closed  # if closed, the other threads run what is queued
            return self._urgent_runs

    def _next_requests(self) -> list[_Request]:
        """Dequeue the oldest request if it is bulk and rows are few, else all interactive ones."""
        with self._lock:
            if self._requests and self._requests[0].is_bulk and len(self._rows) < QUEUED_ROWS:
                self._bulk_threads += 1
                requests = [self._requests.pop(0)]
            else:
                requests = self._dequeue_interactive()
            self._wake()
            return requests

    def _next_interactive_requests(self) -> list[_Request]:
        with self._lock:
            return self._dequeue_interactive()

    def _dequeue_interactive(self) -> list[_Request]:
        interactive = [request for request in self._requests if not request.is_bulk][:QUEUED_ROWS]
        dequeued = set(interactive)
        self._requests = [request for request in self._requests if request not in dequeued]
        return interactive

    def _micro_batch(
        self, requests: Sequence[_Request], dequeue: Callable[[], _MicroBatch]
    ) -> _MicroBatch:
        """Make and queue the rows of requests of one lane, and dequeue the next micro-batch.

        No thread is woken in between: this one takes its micro-batch of these rows first.
        """
        rows = self._rows_of(requests) if requests else []
        with self._lock:
            if requests:
                self._rows += rows
                self._planned = []
                self._bulk_rows += sum(row.request.is_bulk for row in rows)
                self._bulk_threads -= requests[0].is_bulk
            return dequeue()

    def _rows_of(self, requests: Sequence[_Request]) -> list[_QueuedRow]:
        """Make the rows of all requests in one call; a request with a bad item fails alone."""
        try:
            rows = iter(self._make_rows([item for request in requests for item in request.items]))
            return [
                _QueuedRow(request, index, next(rows))
                for request in requests
                for index in range(len(request.items))
            ]
        except Exception as error:
            if len(requests) > 1:
                return [row for request in requests for row in self._rows_of([request])]
            self._finish(requests[0], error)
            return []

    def _next_micro_batch(self) -> _MicroBatch:
        with self._lock:
            rows = self._dequeue_cheapest(self._rows[:QUEUED_ROWS])
            others_run = self._running > 1
            is_alone = not (self._rows or self._requests or others_run)
            return _MicroBatch(rows, self._run_alone if is_alone else self._run)

    def _next_interactive_micro_batch(self) -> _MicroBatch:
        with self._lock:
            interactive = [row for row in self._rows if not row.request.is_bulk]
            self._planned = []
            return _MicroBatch(self._dequeue_cheapest(interactive[:QUEUED_ROWS]), self._run_alone)

    def _dequeue_cheapest(self, candidates: Sequence[_QueuedRow]) -> list[_QueuedRow]:
        """Dequeue the micro-batch with the first of these rows; empty if there are no rows."""
        if not candidates:
            return []
        if not self._planned:
            lengths = [queued.row.length for queued in candidates]
            parts = sorted(self._plan(lengths, 1 + self._threads - self._running), key=min)
            self._planned = [[candidates[index] for index in part] for part in parts]
        micro_batch, *others = self._planned
        dequeued = set(map(id, micro_batch))
        self._rows = [queued for queued in self._rows if id(queued) not in dequeued]
        # A plan of all queued rows is valid until more arrive.
        self._planned = others if sum(map(len, others)) == len(self._rows) else []
        bulk_rows = sum(queued.request.is_bulk for queued in micro_batch)
        self._bulk_rows -= bulk_rows
        self._bulk_threads += bulk_rows > 0
        self._runs_started += 1
        self._room_changed.notify_all()
        self._wake()
        return micro_batch

    def _run_micro_batch(self, micro_batch: _MicroBatch) -> None:
        if not micro_batch.rows:
            return
        started_at_s = self._clock()
        cancelled = self._cancelled({queued.request for queued in micro_batch.rows})
        kept = [queued for queued in micro_batch.rows if queued.request not in cancelled]
        if cancelled:
            dropped = [queued for queued in micro_batch.rows if queued.request in cancelled]
            self._deliver(dropped, RequestCancelled("the request was cancelled; it was not run."))
        if kept:
            rows = [queued.row for queued in kept]
            self._deliver(kept, _outputs(rows, micro_batch.run))
            queued_s = sum(started_at_s - queued.request.submitted_at_s for queued in kept)
            self._on_run(CompletedRun(rows, queued_s))
        with self._lock:
            self._bulk_threads -= any(queued.request.is_bulk for queued in micro_batch.rows)

    def _cancelled(self, requests: set[_Request]) -> set[_Request]:
        """The requests that waited long and are cancelled."""
        latest_start = self._runs_started - self._cancel_check_runs
        return {
            request
            for request in requests
            if request.runs_before < latest_start and request.is_cancelled()
        }

    def _deliver(self, rows: list[_QueuedRow], outputs: _Outputs) -> None:
        if self._rows or self._requests:
            self._answers.put((rows, outputs))
        else:
            self._answer(rows, outputs)

    def _answer_queued(self) -> None:
        while self._answer_next():
            pass
        with self._lock:
            self._work_queued.notify_all()
            self._urgent_queued.notify()
        for thread in self._run_threads:
            thread.join()
        while not self._answers.empty():
            self._answer_next()

    def _answer_next(self) -> bool:
        """Answer the next delivered rows; False if `stop` was called instead."""
        delivered = self._answers.get()
        if delivered is not None:
            self._answer(*delivered)
        return delivered is not None

    def _answer(self, rows: list[_QueuedRow], outputs: _Outputs) -> None:
        for number, (request, index, row) in enumerate(rows):
            if isinstance(outputs, Exception):
                is_complete = request.put(index, outputs)
            else:
                is_complete = request.put(index, ItemResult(row, outputs[number]))
            if is_complete:
                self._finish(request, request.outcome())

    def _finish(self, request: _Request, outcome: Outcome) -> None:
        with self._lock:
            self._unanswered[request.is_bulk] -= 1
        request.answer(outcome)


_SCHEDULERS: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _settle_all() -> None:
    for scheduler in list(_SCHEDULERS):
        scheduler.settle()


def _outputs(rows: list[Any], run: Run) -> _Outputs:
    try:
        return run(rows)
    except Exception as error:
        return error


class _Request:
    """The items of one `submit`, answered together."""

    def __init__(
        self,
        items: Sequence[Any],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool],
        runs_before: int,
        submitted_at_s: float,
    ) -> None:
        self.items = items
        self.is_bulk = len(items) > batching.INTERACTIVE_ROWS
        self.answer = answer
        self.is_cancelled = is_cancelled
        self.runs_before = runs_before
        """Micro-batches that started before the request arrived."""
        self.submitted_at_s = submitted_at_s
        self._results: list[Any] = [None] * len(items)
        self._error: Exception | None = None
        self._missing = len(items)
        self._lock = threading.Lock()

    def put(self, index: int, result: ItemResult | Exception) -> bool:
        """Store the result of the item at `index`; return whether all items have one."""
        if isinstance(result, Exception):
            self._error = result
        self._results[index] = result
        with self._lock:
            self._missing -= 1
            return not self._missing

    def outcome(self) -> Outcome:
        """The results of all items, or the exception of one."""
        return self._error or self._results


class _QueuedRow(NamedTuple):
    """One row of a request."""

    request: _Request
    item_index: int
    """Index of the row's item in the request."""
    row: Any


class _MicroBatch(NamedTuple):
    """Rows that run together, perhaps none, and the function that runs them."""

    rows: list[_QueuedRow]
    run: Run
