"""The runner of batches: asks their lines in the background, and goes on where another stopped."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from halimede.gateway.batches.store import FINAL, Batch, Status, Store, now
from halimede.gateway.errors import Problem

MAX_LINES = 50_000
"""Maximum lines of a batch."""
MAX_LINE_BYTES = 32 * 1024 * 1024
"""Longest line of a batch."""
LINES_AT_ONCE = 64
"""Lines of one batch that are asked at a time. Their answers are written together."""
TEXTS_AT_ONCE = 2048
"""Texts from which no further line is asked at the same time: their vectors are in memory."""
LOOK_S = 2.0
"""Seconds after which a worker looks for batches that another one has not finished."""
log = logging.getLogger("halimede.gateway.batches")
_NUMBER = re.compile(rb'{"id":"batch_req_[0-9a-f]{32}_(\d+)"')
"""Start of a line of answers or failures; the number is that of the line asked."""

Ask = Callable[[Batch, Any], Awaitable[tuple[int, bytes]]]
"""Asks the body of a line; returns the status and body of the answer. Raises Problem to be asked
again after its `retry_after_s`.
"""


class Line(BaseModel):
    """A line of an input file."""

    custom_id: str = Field(max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class Outcome(NamedTuple):
    """The answer to a line, or why there is none."""

    number: int
    is_answer: bool
    row: bytes


class Runner:
    """Runs the batches of a folder, one at a time, as long as no other process runs them."""

    def __init__(self, store: Store, ask: Ask) -> None:
        self.store = store
        self._ask = ask
        self._ended: set[str] = set()
        self._added = asyncio.Event()

    def wake(self) -> None:
        """Look for new batches now."""
        self._added.set()

    async def run(self) -> None:
        """Run batches until cancelled."""
        while True:
            self._added.clear()
            for id_ in await asyncio.to_thread(self.store.batch_ids):
                if id_ not in self._ended:
                    await self._run_if_free(id_)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._added.wait(), LOOK_S)

    async def _run_if_free(self, id_: str) -> None:
        try:
            with FileLock(self.store.lock(id_), timeout=0):
                batch = self.store.any_batch(id_)
                if batch is not None and batch.status not in FINAL:
                    await self._run(batch)
                self._ended.add(id_)
        except Timeout:  # another worker runs it
            return
        except OSError as error:  # it goes on when there is space
            log.warning("A batch waits, because its files cannot be written: %s.", error.strerror)
        except Exception as error:
            log.error("A batch stopped with %s.", type(error).__name__)  # no text of its own
            self._ended.add(id_)

    async def _run(self, batch: Batch) -> None:
        """Run a batch from where it is to its end."""
        path = self.store.data(batch.input_file_id)
        try:
            total = await asyncio.to_thread(_count, path)
        except OSError:
            batch.fail("invalid_input_file", "The input file was deleted.")
            self.store.save(batch)
            return
        if total == 0 or total > MAX_LINES:
            batch.fail(
                "empty_file" if total == 0 else "too_many_lines",
                f"The input file has {total:,} lines; give 1 to {MAX_LINES:,}.",
            )
            self.store.save(batch)
            return
        done = await asyncio.to_thread(self._resume, batch)
        batch.request_counts.total = total
        batch.enter("in_progress")
        self.store.save(batch)
        end = await self._run_lines(batch, path, done)
        await asyncio.to_thread(self._finish, batch, end)

    async def _run_lines(self, batch: Batch, path: Path, done: set[int]) -> Status:
        """Ask the lines that are not done; return the status in which the batch ends."""
        seen: set[str] = set()
        with path.open("rb") as file:
            parsed = (_parsed(raw, batch.endpoint, seen) for raw in _lines(file))
            todo = ((n, line) for n, line in enumerate(parsed) if n not in done)
            while chunk := _chunk(todo):
                asked = asyncio.gather(*(self._outcome(batch, n, line) for n, line in chunk))
                end = await self._until(asked, batch)
                if end is not None:
                    return end
                await asyncio.to_thread(self._write, batch, asked.result())
        return "completed"

    async def _until(self, asked: asyncio.Future[Any], batch: Batch) -> Status | None:
        """Wait for answers; return the status in which the batch ends if it is to end before."""
        try:
            while not asked.done():
                if self.store.cancelled_at(batch.id):
                    return "cancelled"
                if now() >= batch.expires_at:
                    return "expired"
                await asyncio.wait([asked], timeout=LOOK_S / 4)
            return None
        finally:
            asked.cancel()

    async def _outcome(self, batch: Batch, number: int, line: Line | str) -> Outcome:
        id_ = f"batch_req_{batch.id.removeprefix('batch_')}_{number}"
        row: dict[str, Any] = {"id": id_, "custom_id": None, "response": None, "error": None}
        if isinstance(line, str):
            row["error"] = {"code": "invalid_line", "message": line}
            return Outcome(number, False, orjson.dumps(row))
        row["custom_id"] = line.custom_id
        while True:
            try:
                status, body = await self._ask(batch, line.body)
                break
            except Problem as problem:
                await asyncio.sleep(problem.retry_after_s or LOOK_S)
        response = {"status_code": status, "request_id": id_, "body": orjson.Fragment(body)}
        return Outcome(number, status == 200, orjson.dumps({**row, "response": response}))

    def _resume(self, batch: Batch) -> set[int]:
        """Return the numbers of the lines that are done, and cut off a row that is not whole."""
        done: set[int] = set()
        counts = batch.request_counts
        for id_ in (batch.answers_id, batch.failures_id):
            with self.store.data(id_).open("a+b") as file:
                file.seek(0)
                end, before = 0, len(done)
                for row in file:
                    number = _NUMBER.match(row)
                    if not row.endswith(b"\n") or number is None:
                        break
                    done.add(int(number[1]))
                    end += len(row)
                file.truncate(end)
            count = len(done) - before
            if id_ == batch.answers_id:
                counts.completed = count
            else:
                counts.failed = count
        return done

    def _write(self, batch: Batch, outcomes: list[Outcome]) -> None:
        for id_, of_answers in ((batch.answers_id, True), (batch.failures_id, False)):
            rows = [outcome.row for outcome in outcomes if outcome.is_answer == of_answers]
            with self.store.data(id_).open("ab") as file:
                file.write(b"".join(row + b"\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        completed = sum(outcome.is_answer for outcome in outcomes)
        batch.request_counts.completed += completed
        batch.request_counts.failed += len(outcomes) - completed
        self.store.save(batch)

    def _finish(self, batch: Batch, end: Status) -> None:
        """Publish the files of answers and of failures, and end the batch."""
        batch.enter("finalizing")
        batch.cancelling_at = self.store.cancelled_at(batch.id) if end == "cancelled" else None
        self.store.save(batch)
        for id_, field, name in (
            (batch.answers_id, "output_file_id", "output"),
            (batch.failures_id, "error_file_id", "error"),
        ):
            if self.store.data(id_).stat().st_size:
                self.store.publish(id_, f"{batch.id}_{name}.jsonl", "batch_output", batch.key_id)
                setattr(batch, field, id_)
            else:
                self.store.data(id_).unlink()
        batch.enter(end)
        self.store.save(batch)
        with contextlib.suppress(OSError):
            (self.store.batches / f"{batch.id}.cancel").unlink(missing_ok=True)


def _lines(file: Any) -> Iterator[bytes]:
    """Lines of a file that are not empty, each up to MAX_LINE_BYTES."""
    while raw := file.readline(MAX_LINE_BYTES):
        if raw.strip():
            yield raw


def _chunk(lines: Iterator[tuple[int, Line | str]]) -> list[tuple[int, Line | str]]:
    """Return the next lines that are asked together."""
    chunk, texts = [], 0
    for number, line in lines:
        chunk.append((number, line))
        given = "" if isinstance(line, str) else line.body.get("input")
        texts += len(given) if isinstance(given, list) else 1
        if len(chunk) >= LINES_AT_ONCE or texts >= TEXTS_AT_ONCE:
            break
    return chunk


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in itertools.islice(_lines(file), MAX_LINES + 1))


def _parsed(raw: bytes, endpoint: str, seen: set[str]) -> Line | str:
    """Return a line, or what is wrong with it, without any of it."""
    try:
        line = Line.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return "The line is no JSON."
        field = str(first["loc"][0]) if first["loc"] else "The line"
        return f"{field}: {first['msg'].rstrip('.')}."
    if line.url != endpoint:
        return f"url: the batch is for {endpoint}; give the same."
    if line.custom_id in seen:
        return "custom_id: an earlier line has the same."
    seen.add(line.custom_id)
    return line
