"""Requests in a scheduler, their rows, and micro-batches of rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from halimede_engine import batching

READ_BYTES = 64 * 1024
"""A bulk request is turned into rows in parts of this size, or of one item if that is larger. The
request is checked for cancellation before each part."""


class Row(Protocol):
    """An item in the form that the model runs."""

    @property
    def length(self) -> int:
        """Cost of running the row, in tokens."""


class ItemResult(NamedTuple):
    """The result of one item."""

    row: Any
    """The row that `make_rows` made of the item."""
    output: Any
    """What `run` returned for the row."""


Outcome = Sequence[ItemResult] | Exception
"""One result for each item of a request, in order, or the exception that the request ended with."""
Outputs = Sequence[Any] | np.ndarray
"""One output for each row of a micro-batch, in order."""
Run = Callable[[Sequence[Any]], Outputs]
"""Runs one micro-batch: one output for each row, in order."""


class Request:
    """The items of one `submit`, answered together."""

    def __init__(
        self,
        items: Sequence[Any],
        sizes_bytes: Sequence[int],
        answer: Callable[[Outcome], None],
        is_cancelled: Callable[[], bool],
        runs_before: int,
        submitted_at_s: float,
    ) -> None:
        self.items = items
        """Empty once the request has rows."""
        self.rows = len(items)
        self.size_bytes = sum(sizes_bytes)
        self.is_bulk = batching.is_bulk(self.rows, self.size_bytes)
        """The lane; a request may become bulk when its rows show how many tokens it has."""
        self.tokens = 0
        """Tokens of its rows together; 0 until it has rows."""
        self.answer = answer
        self.is_cancelled = is_cancelled
        self.runs_before = runs_before
        """Micro-batches that started before the request arrived."""
        self.submitted_at_s = submitted_at_s
        self.is_answered = False
        self._sizes_bytes = sizes_bytes
        self._results: list[Any] = [None] * len(items)
        self._missing = len(items)
        self._lock = threading.Lock()

    @property
    def is_short(self) -> bool:
        """Whether it does not wait for longer ones; False until it has rows."""
        return 0 < self.tokens <= batching.SHORT_TOKENS

    def parts(self) -> Iterator[Sequence[Any]]:
        """The items in parts of up to READ_BYTES, or of one item."""
        start = size_bytes = 0
        for index, item_bytes in enumerate(self._sizes_bytes):
            size_bytes += item_bytes
            if size_bytes > READ_BYTES and index > start:
                yield self.items[start:index]
                start, size_bytes = index, item_bytes
        yield self.items[start:]

    def put(self, index: int, result: ItemResult) -> bool:
        """Store the result of the item at `index`; return whether all items have one."""
        self._results[index] = result
        with self._lock:
            self._missing -= 1
            return not self._missing

    def results(self) -> Sequence[ItemResult]:
        """The results of all items, in order."""
        return self._results


class QueuedRow(NamedTuple):
    """One row of a request."""

    request: Request
    item_index: int
    """Index of the row's item in the request."""
    row: Any


class MicroBatch(NamedTuple):
    """Rows that run together, perhaps none, and the function that runs them."""

    rows: list[QueuedRow]
    run: Run


def queued_rows(requests: Sequence[Request], rows: Sequence[Any]) -> list[QueuedRow]:
    """The rows of requests, each with its place.

    Raises:
        ValueError: there are more or fewer rows than items.
    """
    places = [(request, index) for request in requests for index in range(request.rows)]
    return [QueuedRow(*place, row) for place, row in zip(places, rows, strict=True)]


def by_request(rows: Sequence[QueuedRow]) -> list[list[QueuedRow]]:
    """The rows of each request, in order."""
    groups: dict[Request, list[QueuedRow]] = {}
    for queued in rows:
        groups.setdefault(queued.request, []).append(queued)
    return list(groups.values())


def run_rows(rows: Sequence[QueuedRow], run: Run) -> Outputs | Exception:
    """The outputs of rows, or the exception that running them raised."""
    try:
        outputs = run([queued.row for queued in rows])
        if len(outputs) != len(rows):
            raise ValueError(f"a run of {len(rows)} rows gave {len(outputs)} outputs")
        return outputs
    except Exception as error:
        return error
