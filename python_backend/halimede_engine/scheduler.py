"""Continuous batching: runs the rows of many requests together, in the cheapest micro-batches.

            submit                  make_rows                plan, run              answer
    request ──────> queued request ──────────> queued rows ──────────> micro-batch ──────> caller

A request is bulk if it has many items, many bytes of text or many tokens (`batching.is_bulk`), any
other is interactive. Each of the two lanes has its own limits. The threads start with the first
`submit`:

- `threads` run threads make the rows of interactive requests, and run micro-batches of both lanes.
- The bulk reader makes the rows of bulk requests, so that nothing else waits for long texts.
- The urgent thread serves short requests while the run threads are busy with longer ones, and
  single longer texts while they are busy with bulk.
- The answer thread calls `answer` under load.

`run_now` runs an interactive request in the caller's thread instead, while nothing else runs.

What fails, fails alone. A bad item fails its request; a micro-batch that fails is run again, the
rows of each request for themselves; and no callback that raises ends a thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from halimede_engine import batching
from halimede_engine.requests import (
    ItemResult,
    MicroBatch,
    Outcome,
    Outputs,
    QueuedRow,
    Request,
    Run,
    by_request,
    queued_rows,
    run_rows,
)
from halimede_ops.errors import RequestCancelled, ServerError, ServerOverloaded

T = TypeVar("T")

QUEUED_ROWS = 128
"""Rows from which a micro-batch is chosen: enough to fill one, few enough to plan again for each
(0.2 ms). `wait_for_room` blocks while more interactive items are queued."""

QUEUED_BULK_ROWS = 256
"""`wait_for_room` blocks while more bulk items are queued: the row of an image has 150 kB."""

FEW_SHORT_ROWS = 2
"""So many short rows run without longer ones beside them. More of them are load: run together they
give 12 % more texts a second, with 32 callers."""

GATHER_S = 0.001
"""Maximum duration of `gather`: requests that are read together cost less than one by one."""

CANCEL_CHECK_RUNS = 16
"""Micro-batches that run before an interactive request is checked for cancellation. The check is a
message to Triton, which takes time too. Bulk is checked before each part is read and run."""

EXIT_WAIT_S = 10.0
"""Maximum time that the end of a program waits for runs under way: a daemon thread that is ended
inside onnxruntime aborts the process."""


MakeRows = Callable[[Sequence[Any]], Sequence[Any]]
"""Makes one row (`requests.Row`) of each item, in order."""
Plan = Callable[[Sequence[int], int], list[list[int]]]
"""Splits rows of these lengths into micro-batches of indices, for a number of free threads."""


class CompletedRun(NamedTuple):
    """A micro-batch after its run."""

    rows: Sequence[Any]
    queued_s: float
    """Seconds between `submit` and the run, added up over all rows."""


class Scheduler:
    """Threads that turn queued requests into rows and run the rows in micro-batches.

    A thread that becomes free takes the micro-batch of the row that is queued longest: by turns of
    any row and of an interactive one, so no row starves and none waits for all of bulk. The other
    rows of the micro-batch are those that cost least beside it, from any request, so there is
    little padding.

    Args:
        run: runs one micro-batch.
        plan: splits the queued rows into micro-batches. If it raises, each row runs alone.
        threads: maximum number of micro-batches that run at the same time, those of `run_now`
            included, besides that of the urgent thread.
        make_rows: makes one row of each item; by default the items are rows.
        run_alone: runs a micro-batch while no other runs, and those of the urgent thread; by
            default `run`.
        size_bytes: bytes of text of one item; by default unknown.
        on_run: called after each run that succeeded, in the thread that ran it.
        on_error: called with an exception that a callback raised, other than `run` and `make_rows`.
            Such an exception ends neither a request nor a thread.
        on_broken: called with the exception that ended a thread. The scheduler is closed then, and
            its unanswered requests end with ServerError.
        clock: time in seconds, for `CompletedRun.queued_s`; without it that is 0.
        max_requests: maximum number of unanswered requests in each lane.
        max_bulk_bytes: maximum bytes of text of all unanswered bulk requests.
        cancel_check_runs: micro-batches that run before an interactive request is checked for
            cancellation.
        reader_niceness: niceness of the bulk reader above that of the process; on Linux only.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        threads: int,
        *,
        make_rows: MakeRows = list,
        run_alone: Run | None = None,
        size_bytes: Callable[[Any], int] = lambda item: 0,
        on_run: Callable[[CompletedRun], None] = lambda completed: None,
        on_error: Callable[[Exception], None] = lambda error: None,
        on_broken: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = lambda: 0.0,
        max_requests: int | None = None,
        max_bulk_bytes: int | None = None,
        cancel_check_runs: int = CANCEL_CHECK_RUNS,
        reader_niceness: int = 0,
    ) -> None:
        self._run, self._run_alone = run, run_alone or run
        self._plan, self._threads, self._make_rows = plan, threads, make_rows
        self._size_bytes, self._clock = size_bytes, clock
        self._on_run, self._on_error, self._on_broken = on_run, on_error, on_broken
        self._max_requests, self._max_bulk_bytes = max_requests, max_bulk_bytes
        self._cancel_check_runs, self._reader_niceness = cancel_check_runs, reader_niceness
        self._answers: queue.SimpleQueue[_Delivered | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.RLock()
        """Guards all attributes of `_reset`. Reentrant, so that `close` can find out whether the
        garbage collector called it while this thread held the lock."""
        self._work_queued = threading.Condition(self._lock)
        self._bulk_queued = threading.Condition(self._lock)
        self._urgent_queued = threading.Condition(self._lock)
        self._room_changed = threading.Condition(self._lock)
        self._run_threads: list[threading.Thread] = []
        self._answer_thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._reset()
        _SCHEDULERS.add(self)

    def _reset(self) -> None:
        self._requests: list[Request] = []
        """Requests without rows yet, in order of arrival."""
        self._rows: list[QueuedRow] = []
        """Rows that wait to run, in order of arrival."""
        self._planned: list[list[QueuedRow]] = []
        """The micro-batches of all `_rows`, in the order they run; empty: not planned yet."""
        self._unanswered: dict[bool, set[Request]] = {True: set(), False: set()}
        """Unanswered requests by `is_bulk`."""
        self._runs_started = 0
        self._running = 0
        """Run threads at work, and callers of `run_now`."""
        self._reads_bulk = False
        self._urgent_runs = False
        """Whether the urgent thread is at work."""
        self._long_runs = 0
        """Threads that run rows of a request that is not short."""
        self._bulk_runs = 0
        """Threads that run rows of bulk."""
        self._is_interactive_turn = False
        """Whether the next micro-batch is that of an interactive row, if there is one."""
        self._broken = ""
        """The message of the requests' errors after a thread has died; empty: none has."""

    def run_now(self, items: Sequence[Any]) -> tuple[Sequence[Any], Outputs] | None:
        """Run an interactive request in the caller's thread: its rows and their outputs, in order.

        None if the request is bulk or others are queued or run: `submit` runs it together with
        those.

        Raises:
            Exception: what `make_rows` or `run_alone` raised.
        """
        if batching.is_bulk(len(items), sum(map(self._size_bytes, items))):
            return None
        with self._lock:
            if self._running or self._requests or self._rows or self._closed:
                return None
            self._running += 1
            self._runs_started += 1
        try:
            rows = self._make_rows(items)
            outputs = self._run_alone(rows)
        finally:
            self._end_turn()
        self._safely(None, self._on_run, CompletedRun(rows, 0.0))
        return rows, outputs

    def submit(
        self,
        items: Sequence[Any],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Queue the items of one request.

        `answer` is called once with the outcome, in another thread. If `is_cancelled` returns
        True after a long wait, or for bulk at any time before its last run, no more rows run and
        the outcome is RequestCancelled.

        Raises:
            ServerOverloaded: this lane has `max_requests` unanswered requests, or bulk has
                `max_bulk_bytes` with this request.
            RequestCancelled: the scheduler is closed.
            ServerError: the scheduler has lost a thread.
        """
        sizes_bytes = [self._size_bytes(item) for item in items]
        now_s = self._safely(0.0, self._clock)
        with self._lock:
            request = Request(items, sizes_bytes, answer, is_cancelled, self._runs_started, now_s)
            self._check_room(request)
            self._unanswered[request.is_bulk].add(request)
            self._requests.append(request)
            has_threads = self._answer_thread is not None or self._start_threads()
            self._wake()
        if not has_threads:
            self._serve_here()

    def gather(self) -> None:
        """Wait up to GATHER_S for more requests, if every thread is busy with short rows."""
        with self._lock:
            if self._running == self._threads and not self._long_runs:
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
        for thread in own:
            if thread is not None and not is_within:
                thread.join()

    def settle(self) -> None:
        """Drop all queued requests unanswered, and wait for the runs under way.

        It is for the end of a program: a handler that is called later may still send requests.
        """

        def is_settled() -> bool:
            self._requests, self._rows, self._planned = [], [], []
            return not (self._running or self._reads_bulk or self._urgent_runs)

        if self._pid == os.getpid():  # a forked child has none of the threads
            with self._lock:
                self._room_changed.wait_for(is_settled, EXIT_WAIT_S)

    def _check_room(self, request: Request) -> None:
        if self._broken:
            raise ServerError(self._broken)
        if self._closed:
            raise RequestCancelled("the engine is closed; the request was not run.")
        lane = self._unanswered[request.is_bulk]
        if self._max_requests is not None and len(lane) >= self._max_requests:
            raise ServerOverloaded(f"the queue is full: {len(lane):,} requests wait. Send again.")
        if request.is_bulk and self._max_bulk_bytes is not None:
            queued_bytes = sum(waiting.size_bytes for waiting in lane)
            if queued_bytes + request.size_bytes > self._max_bulk_bytes:
                raise ServerOverloaded(
                    f"the queue is full: texts of {queued_bytes:,} bytes wait and this request has "
                    f"{request.size_bytes:,}; the queue takes {self._max_bulk_bytes:,}. Send again."
                )

    def _start_threads(self) -> bool:
        """Start the threads; False if none can be started: the interpreter is shutting down."""
        # Under load another thread answers, so that running threads lose no time.
        loops = [(self._answer_queued, "answer"), (self._read_bulk, "read")]
        loops += [*[(self._serve, "run")] * self._threads, (self._serve_urgent, "urgent")]
        started = []
        for loop, name in loops:
            thread = threading.Thread(
                target=self._watch, args=(loop,), name=f"engine-{name}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                break
            started.append(thread)
        if not started:
            return False
        self._answer_thread, *self._run_threads = started
        if len(started) < len(loops):
            self._break("the system has too few threads for the engine")
        return True

    def _watch(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop. If it raises, close the scheduler and say so to every request."""
        try:
            loop()
        except BaseException as error:
            self._break(f"the engine lost a thread ({type(error).__name__})")
            self._safely(None, self._on_broken, error)

    def _break(self, reason: str) -> None:
        """Close the scheduler, and tell the reason to every request, now and later."""
        with self._lock:
            self._broken = f"{reason}; start it again."
            unanswered = [*self._unanswered[True], *self._unanswered[False]]
            self._requests, self._rows, self._planned = [], [], []
            self._reads_bulk = False
            self.stop()
            self._wake_all()
        for request in unanswered:
            self._finish(request, ServerError(self._broken))

    def _safely(self, default: T, callback: Callable[..., T], *args: Any) -> T:
        """Return what a callback returns. If it raises, pass the error to `on_error` and return
        `default`.
        """
        try:
            return callback(*args)
        except Exception as error:
            with contextlib.suppress(Exception):
                self._on_error(error)
            return default

    def _has_room(self) -> bool:
        bulk = sum(request.rows for request in self._requests if request.is_bulk)
        interactive = sum(request.rows for request in self._requests) - bulk
        bulk_rows = sum(queued.request.is_bulk for queued in self._rows)
        return self._closed or (
            bulk + bulk_rows <= QUEUED_BULK_ROWS
            and interactive + len(self._rows) - bulk_rows <= QUEUED_ROWS
        )

    def _interactive_rows(self) -> list[QueuedRow]:
        return [queued for queued in self._rows if not queued.request.is_bulk]

    def _urgent_rows(self) -> list[QueuedRow]:
        """Rows for the urgent thread: those of short requests; beside bulk, and if there are none,
        those of the first interactive request that is not too long for it.
        """
        short = [queued for queued in self._rows if queued.request.is_short]
        if not self._bulk_runs:
            return short if len(short) <= FEW_SHORT_ROWS else []
        if short:
            return short
        longer = (
            queued.request
            for queued in self._rows
            if not queued.request.is_bulk and queued.request.tokens <= batching.URGENT_TOKENS
        )
        first = next(longer, None)
        return [queued for queued in self._rows if queued.request is first]

    def _has_interactive(self) -> bool:
        return any(not request.is_bulk for request in self._requests)

    def _is_urgent(self) -> bool:
        return self._long_runs > 0 and (self._has_interactive() or bool(self._urgent_rows()))

    def _may_run(self) -> bool:
        return self._running < self._threads and (bool(self._rows) or self._has_interactive())

    def _may_read(self) -> bool:
        is_bulk = any(request.is_bulk for request in self._requests)
        return is_bulk and len(self._rows) < QUEUED_ROWS

    def _has_ended(self) -> bool:
        is_read = self._reads_bulk or self._urgent_runs  # by a thread that may leave rows to others
        return self._closed and not (self._rows or self._requests or is_read)

    def _wake(self) -> None:
        """Wake one thread of each kind that has work; it wakes the next for what it leaves."""
        if self._has_ended():
            self._wake_all()
        if self._may_run():
            self._work_queued.notify()
        if self._may_read():
            self._bulk_queued.notify()
        if self._is_urgent():
            self._urgent_queued.notify()

    def _wake_all(self) -> None:
        for changed in (
            self._work_queued, self._bulk_queued, self._urgent_queued, self._room_changed
        ):  # fmt: skip
            changed.notify_all()

    def _serve(self) -> None:
        # No name here is bound to requests: while the thread waits they would keep their engine.
        while self._take_turn(self._wait_for_work()):
            pass

    def _take_turn(self, requests: Sequence[Request] | None) -> bool:
        """Run the next micro-batch, once these requests are queued; False if there are none."""
        if requests is None:
            return False
        try:
            self._read_and_run(requests, self._next_micro_batch)
        finally:
            self._end_turn()
        return True

    def _serve_here(self) -> None:
        """Answer all queued requests in the caller's thread."""
        while self._rows or self._requests:
            with self._lock:
                self._running += 1
                bulk = self._next_bulk_request() if self._may_read() else None
                requests = self._next_interactive_requests()
            self._queue_bulk(bulk)
            self._take_turn(requests)
        while not self._answers.empty():
            self._answer_next()

    def _serve_urgent(self) -> None:
        while self._wait_for_urgent_work():
            try:
                self._read_and_run(self._next_interactive_requests(), self._next_urgent_micro_batch)
            finally:
                with self._lock:
                    self._urgent_runs = False
                    self._room_changed.notify_all()
                    self._wake()

    def _read_bulk(self) -> None:
        if sys.platform == "linux" and self._reader_niceness:  # elsewhere it would be the process's
            os.nice(self._reader_niceness)
        while self._queue_bulk(self._wait_for_bulk()):
            pass

    def _queue_bulk(self, request: Request | None) -> bool:
        """Make and queue the rows of a bulk request. Return False without a request."""
        if request is None:
            return False
        rows = self._bulk_rows(request)
        with self._lock:
            self._reads_bulk = False
            self._queue_rows(rows)
            self._room_changed.notify_all()
            self._wake()
        return True

    def _wait_for_bulk(self) -> Request | None:
        """Block until bulk is queued and rows are few; None if closed and nothing is left."""
        with self._lock:
            self._bulk_queued.wait_for(lambda: self._may_read() or self._has_ended())
            return None if self._has_ended() else self._next_bulk_request()

    def _next_bulk_request(self) -> Request:
        request = next(request for request in self._requests if request.is_bulk)
        self._requests.remove(request)
        self._reads_bulk = True
        return request

    def _wait_for_work(self) -> list[Request] | None:
        """Block until something is queued and may run; return the requests to make rows of, perhaps
        none. None if closed and nothing is left.
        """
        with self._lock:
            self._work_queued.wait_for(lambda: self._may_run() or self._has_ended())
            if self._has_ended():
                return None
            self._running += 1
            return self._next_interactive_requests()

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

    def _next_interactive_requests(self) -> list[Request]:
        with self._lock:
            interactive = [r for r in self._requests if not r.is_bulk][:QUEUED_ROWS]
            dequeued = set(interactive)
            self._requests = [r for r in self._requests if r not in dequeued]
            self._wake()
            return interactive

    def _read_and_run(self, requests: Sequence[Request], dequeue: Callable[[], MicroBatch]) -> None:
        """Make and queue the rows of interactive requests, then run the next micro-batch.

        No thread is woken in between: this one takes its micro-batch of these rows first.
        """
        rows = self._rows_of(requests)
        with self._lock:
            self._queue_rows(rows)
            micro_batch = dequeue()
            is_long = any(not queued.request.is_short for queued in micro_batch.rows)
            is_bulk = any(queued.request.is_bulk for queued in micro_batch.rows)
            self._long_runs += is_long
            self._bulk_runs += is_bulk
            self._wake()
        try:
            self._run_micro_batch(micro_batch)
        finally:
            with self._lock:
                self._long_runs -= is_long
                self._bulk_runs -= is_bulk

    def _queue_rows(self, rows: Sequence[QueuedRow]) -> None:
        if rows and not self._broken:  # the requests of a broken scheduler are answered
            self._rows += rows
            self._planned = []

    def _rows_of(self, requests: Sequence[Request]) -> list[QueuedRow]:
        """Make the rows of all requests in one call; a request with a bad item fails alone."""
        if not requests:
            return []
        items = [item for request in requests for item in request.items]
        try:
            rows = queued_rows(requests, self._make_rows(items))
            for own in by_request(rows):
                self._choose_lane(own)
        except Exception as error:
            if len(requests) > 1:
                return [row for request in requests for row in self._rows_of([request])]
            self._finish(requests[0], error)
            return []
        return rows

    def _bulk_rows(self, request: Request) -> list[QueuedRow]:
        """Make the rows of a bulk request in parts, and stop when its caller has gone."""
        rows: list[Any] = []
        try:
            for part in request.parts():
                if self._is_cancelled(request):
                    raise _cancelled()
                rows += self._make_rows(part)
            request.items = ()
            return queued_rows([request], rows)
        except Exception as error:
            self._finish(request, error)
            return []

    def _choose_lane(self, rows: Sequence[QueuedRow]) -> None:
        """Make a request bulk or short by the tokens of its rows; it needs its items no more."""
        request = rows[0].request
        request.items = ()
        tokens = sum(queued.row.length for queued in rows)
        with self._lock:
            request.tokens = tokens
            if batching.is_bulk(len(rows), tokens=tokens):
                self._unanswered[False].discard(request)
                self._unanswered[True].add(request)
                request.is_bulk = True

    def _next_micro_batch(self) -> MicroBatch:
        waiting = (self._is_interactive_turn and self._interactive_rows()) or self._rows
        self._is_interactive_turn = not self._is_interactive_turn
        candidates = list(waiting)
        if sum(row.request.is_short for row in waiting) <= FEW_SHORT_ROWS:
            # Longer rows beside them would hold up their answer.
            is_short = waiting[0].request.is_short if waiting else False
            candidates = [row for row in waiting if row.request.is_short == is_short]
        if len(candidates) < len(self._rows):
            self._planned = []
        rows = self._dequeue_cheapest(candidates[:QUEUED_ROWS])
        is_alone = not (self._rows or self._has_interactive() or self._running > 1)
        return MicroBatch(rows, self._run_alone if is_alone else self._run)

    def _next_urgent_micro_batch(self) -> MicroBatch:
        self._planned = []
        rows = self._dequeue_cheapest(self._urgent_rows()[:QUEUED_ROWS])
        return MicroBatch(rows, self._run_alone)

    def _dequeue_cheapest(self, candidates: Sequence[QueuedRow]) -> list[QueuedRow]:
        """Dequeue the micro-batch with the first of these rows; empty if there are no rows."""
        if not candidates:
            return []
        micro_batch, *others = self._planned or self._micro_batches(candidates)
        dequeued = set(map(id, micro_batch))
        self._rows = [queued for queued in self._rows if id(queued) not in dequeued]
        # A plan of all queued rows is valid until more arrive.
        self._planned = others if sum(map(len, others)) == len(self._rows) else []
        self._runs_started += 1
        self._room_changed.notify_all()
        return micro_batch

    def _micro_batches(self, candidates: Sequence[QueuedRow]) -> list[list[QueuedRow]]:
        """These rows in micro-batches, that of the first row first; one by one if `plan` fails."""
        lengths = [queued.row.length for queued in candidates]
        alone = [[index] for index in range(len(candidates))]
        parts = self._safely(alone, self._checked_plan, lengths)
        return [[candidates[index] for index in part] for part in parts]

    def _checked_plan(self, lengths: Sequence[int]) -> list[list[int]]:
        parts = sorted(self._plan(lengths, 1 + self._threads - self._running), key=min)
        if sorted(index for part in parts for index in part) != list(range(len(lengths))):
            raise ValueError("a plan must have each row once")
        return parts

    def _run_micro_batch(self, micro_batch: MicroBatch) -> None:
        for request in {queued.request for queued in micro_batch.rows}:
            if self._is_cancelled(request):
                self._finish(request, _cancelled())
        rows = [queued for queued in micro_batch.rows if not queued.request.is_answered]
        if rows:
            self._run_rows(rows, micro_batch.run, self._safely(0.0, self._clock))

    def _run_rows(self, rows: list[QueuedRow], run: Run, started_at_s: float) -> None:
        """Run rows together. If that fails, run those of each request alone: an error reaches the
        request whose rows raise it, and no other.
        """
        outputs = run_rows(rows, run)
        if not isinstance(outputs, Exception):
            self._deliver(rows, outputs)
            queued_s = sum(started_at_s - queued.request.submitted_at_s for queued in rows)
            completed = CompletedRun([queued.row for queued in rows], queued_s)
            self._safely(None, self._on_run, completed)
            return
        requests = by_request(rows)
        if len(requests) == 1:
            self._finish(rows[0].request, outputs)
            return
        for own in requests:
            self._run_rows(own, run, started_at_s)

    def _is_cancelled(self, request: Request) -> bool:
        """Whether a request's caller has gone. It is asked for bulk, and after a long wait."""
        has_waited = request.runs_before < self._runs_started - self._cancel_check_runs
        return (request.is_bulk or has_waited) and self._safely(False, request.is_cancelled)

    def _deliver(self, rows: list[QueuedRow], outputs: Outputs) -> None:
        if (self._rows or self._requests) and not self._closed:
            self._answers.put((rows, outputs))
        else:
            self._answer(rows, outputs)

    def _answer_queued(self) -> None:
        while self._answer_next():
            pass
        with self._lock:
            self._wake_all()
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

    def _answer(self, rows: list[QueuedRow], outputs: Outputs) -> None:
        for number, (request, index, row) in enumerate(rows):
            if request.put(index, ItemResult(row, outputs[number])):
                self._finish(request, request.results())

    def _finish(self, request: Request, outcome: Outcome) -> None:
        """Answer a request, once. If it failed, its other rows do not run."""
        with self._lock:
            if request.is_answered:
                return
            request.is_answered = True
            self._unanswered[request.is_bulk].discard(request)
            if isinstance(outcome, Exception):
                self._rows = [queued for queued in self._rows if queued.request is not request]
                self._planned = []
        self._safely(None, request.answer, outcome)


_Delivered = tuple[list[QueuedRow], Outputs]
_SCHEDULERS: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _settle_all() -> None:
    for scheduler in list(_SCHEDULERS):
        scheduler.settle()


def _cancelled() -> RequestCancelled:
    return RequestCancelled("the request was cancelled; it was not run.")
