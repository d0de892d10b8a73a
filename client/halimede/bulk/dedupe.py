"""Equal texts of a job, embedded once."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from halimede.bulk.windows import Vectors, Window
from halimede_ops.errors import InvalidInput

DIGEST_BYTES = 16
LOOKED_UP = 512
"""Digests in one query: SQLite takes some thousands."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS texts (
    digest BLOB PRIMARY KEY,
    vector BLOB NOT NULL,
    tokens INTEGER NOT NULL,
    truncated INTEGER NOT NULL
)
"""


class Deduplicated:
    """A window of which only those texts are sent that are not known yet."""

    def __init__(self, owner: Deduplication, window: Window) -> None:
        self._owner = owner
        self._count = len(window.values)
        self._result: Vectors | None = None
        self.known: dict[int, tuple[bytes, int, int]] = {}
        """Row → vector, tokens and truncated."""
        self.elsewhere: dict[int, tuple[Deduplicated, int]] = {}
        """Row → the window before, or this one, that has the same text, and its row there."""
        self.digests: dict[int, bytes] = {}
        """Row → digest of a text that this window sends."""
        self.own: list[int] = []
        """Rows of the window that is sent."""
        self.future: Future[Vectors]

    def cancel(self) -> None:
        """Cancel what is sent."""
        self.future.cancel()

    def result(self) -> Vectors:
        """Return the vectors of all rows. Windows are asked in the order in which they began.

        Raises:
            HalimedeError: as the window that was sent.
        """
        if self._result is not None:
            return self._result
        sent = self.future.result()
        width, dtype = sent.vectors.shape[1], sent.vectors.dtype
        vectors = np.zeros((self._count, width), dtype)
        tokens, truncated = np.zeros(self._count, np.int32), np.zeros(self._count, np.bool_)
        vectors[self.own], tokens[self.own] = sent.vectors, sent.tokens
        truncated[self.own] = sent.truncated
        errors = {self.own[place]: error for place, error in sent.errors.items()}
        for row, (vector, count, is_cut) in self.known.items():
            vectors[row] = np.frombuffer(vector, dtype)
            tokens[row], truncated[row] = count, is_cut
        self._result = Vectors(vectors, tokens, truncated, errors, sent.versions)
        for row, (window, place) in self.elsewhere.items():
            same = window.result()
            vectors[row], tokens[row] = same.vectors[place], same.tokens[place]
            truncated[row] = same.truncated[place]
            if place in same.errors:
                errors[row] = same.errors[place]
        self.elsewhere.clear()  # the windows before can go
        self._owner.keep(self.digests, self._result)
        return self._result


class Deduplication:
    """Vectors of a job's texts by digest, in a file: memory does not grow with the texts.

    For one thread at a time. The file belongs to one job: its keys are of texts alone.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it.

        Raises:
            InvalidInput: it is no such file.
        """
        self._path = path
        self._in_flight: dict[bytes, tuple[Deduplicated, int]] = {}
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            # What a power failure loses is embedded again.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute(SCHEMA)
        except sqlite3.Error as error:
            raise InvalidInput(f"{path} is no file of --dedupe ({error}). Delete it.") from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def start(self, window: Window, embed: Callable[[Window], Future[Vectors]]) -> Deduplicated:
        """Start to embed those texts of a window that no window before has."""
        started = Deduplicated(self, window)
        digests = [
            None if row in window.errors else _digest(text)
            for row, text in enumerate(window.values)
        ]
        known = self._look_up([digest for digest in digests if digest is not None])
        for row, digest in enumerate(digests):
            if digest is None:
                started.own.append(row)  # it keeps its error
            elif digest in known:
                started.known[row] = known[digest]
            elif digest in self._in_flight:
                started.elsewhere[row] = self._in_flight[digest]
            else:
                self._in_flight[digest] = (started, row)
                started.digests[row] = digest
                started.own.append(row)
        errors = {
            place: window.errors[row]
            for place, row in enumerate(started.own)
            if row in window.errors
        }
        values = [window.values[row] for row in started.own]
        rows = [window.rows[row] for row in started.own]
        started.future = embed(Window(values, window.columns.slice(0, 0), errors, rows))
        return started

    def keep(self, digests: dict[int, bytes], done: Vectors) -> None:
        """Keep the vectors of the texts that a window has sent, by their rows."""
        kept = [
            (digest, done.vectors[row].tobytes(), int(done.tokens[row]), int(done.truncated[row]))
            for row, digest in digests.items()
            if row not in done.errors
        ]
        self._database.execute("BEGIN")
        self._database.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?)", kept)
        self._database.execute("COMMIT")
        for digest in digests.values():
            del self._in_flight[digest]

    def delete(self) -> None:
        """Delete the file: the job is done."""
        self._database.close()
        for path in self._path.parent.glob(f"{self._path.name}*"):
            path.unlink(missing_ok=True)

    def _look_up(self, digests: Sequence[bytes]) -> dict[bytes, tuple[bytes, int, int]]:
        found = {}
        for start in range(0, len(digests), LOOKED_UP):
            asked = digests[start : start + LOOKED_UP]
            marks = ",".join("?" * len(asked))
            query = f"SELECT * FROM texts WHERE digest IN ({marks})"  # noqa: S608  # marks alone
            for digest, vector, tokens, truncated in self._database.execute(query, asked):
                found[digest] = (vector, tokens, truncated)
        return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
