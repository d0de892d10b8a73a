"""Values in an SQLite file, shared by any number of processes.

SQLite ships with Python, reports a damaged file instead of crashing on it, and allows reads while
one process writes (write-ahead log). Writes are not synced, so a power failure may damage the
file: it is then deleted and created again. Each value has its own checksum.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tenacity

from halimede.cache.tier import KeyValue
from halimede_ops.errors import InvalidInput

FILE_NAME = "vectors-1.sqlite"
PAGE_BYTES = 8192
"""A page holds five vectors of 384 dims and is then 97 % full."""
WRITE_AHEAD_LOG_BYTES = 2 * 1024 * 1024
"""Size at which the write-ahead log is merged into the file."""
MIN_BYTES = 16 * 1024 * 1024
EVICTED_ROWS = 256
"""Values evicted at once."""
MAX_SHARE = 1 / 8
"""Largest value, as a share of `max_bytes`."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (
    id INTEGER PRIMARY KEY, -- grows with each write: the lowest id is the oldest value
    key BLOB NOT NULL UNIQUE,
    written_s INTEGER NOT NULL,
    value BLOB NOT NULL
)
"""

Result = TypeVar("Result")


class Disk:
    """Stores at most `max_bytes` of values in a folder; the oldest are evicted first."""

    def __init__(
        self,
        folder: Path | str,
        max_bytes: int,
        ttl_s: float | None = None,
        *,
        name: str = "disk",
        timeout_s: float = 1.0,
    ) -> None:
        """Take the folder; the first use creates it, readable by this user alone.

        Raises:
            InvalidInput: `max_bytes` is less than MIN_BYTES.
        """
        if max_bytes < MIN_BYTES:
            raise InvalidInput(f"max_bytes is {max_bytes}. Give a disk tier at least {MIN_BYTES}.")
        self.name = name
        self.timeout_s = timeout_s
        self.ttl_s = ttl_s
        path = Path(folder) / FILE_NAME
        # The write-ahead log can grow to twice its limit while another process reads.
        pages = (max_bytes - 2 * WRITE_AHEAD_LOG_BYTES) // PAGE_BYTES
        self._max_value_bytes = int(MAX_SHARE * max_bytes)
        self._reads = _Connection(path, pages, timeout_s)
        self._writes = _Connection(path, pages, timeout_s)
        self._size_bytes: int | None = None

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the pages in use after this process's last write; None before the first."""
        return self._size_bytes

    def stats(self) -> Mapping[str, int | None]:
        """The size."""
        return {"size_bytes": self._size_bytes}

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return each key's value, or None when it is unknown or older than `ttl_s`."""
        oldest_s = 0 if self.ttl_s is None else time.time() - self.ttl_s
        return self._reads.run(lambda database: _select(database, keys, oldest_s))

    def put(self, values: Sequence[KeyValue]) -> None:
        """Store the values and evict the oldest beyond `max_bytes`.

        A value larger than MAX_SHARE of that is not stored.
        """
        fitting = [(key, value) for key, value in values if len(value) <= self._max_value_bytes]
        self._size_bytes = self._writes.run(
            lambda database: _insert(database, fitting, self._writes.max_pages)
        )

    def clear(self) -> None:
        """Delete every value, other processes' too; the file keeps no byte of them."""
        self._writes.run(_clear)
        self._size_bytes = 0

    def close(self) -> None:
        """Close the file."""
        self._reads.close()
        self._writes.close()


class _Connection:
    """A connection for one caller at a time; opened on first use, and again after an error."""

    def __init__(self, path: Path, max_pages: int, timeout_s: float) -> None:
        self.max_pages = max_pages
        self._path = path
        self._timeout_s = timeout_s
        self._database: sqlite3.Connection | None = None
        self._file_id: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._lock:
            try:
                return work(self._connect())
            except BaseException as error:
                self._disconnect()
                if _is_damaged(error):
                    self._delete_file()
                raise

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _connect(self) -> sqlite3.Connection:
        if self._database is not None and self._file_id != _file_id(self._path):
            self._disconnect()  # the file was replaced or deleted
        if self._database is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
            )
            self._file_id = _file_id(self._path)
            for setting, value in (
                ("page_size", PAGE_BYTES),
                ("synchronous", "off"),
                ("wal_autocheckpoint", WRITE_AHEAD_LOG_BYTES // PAGE_BYTES),
                ("journal_size_limit", WRITE_AHEAD_LOG_BYTES),
                ("max_page_count", self.max_pages),
            ):
                self._database.execute(f"PRAGMA {setting}={value}")
            self._use_write_ahead_log(self._database)
            self._database.execute(SCHEMA)
        return self._database

    def _use_write_ahead_log(self, database: sqlite3.Connection) -> None:
        """Switch to the write-ahead log; SQLite's own timeout does not cover this statement."""
        tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_locked),
            stop=tenacity.stop_after_delay(self._timeout_s),
            wait=tenacity.wait_random(0, 0.01),
            reraise=True,
        )(database.execute, "PRAGMA journal_mode=wal")

    def _disconnect(self) -> None:
        if self._database is not None:
            database, self._database = self._database, None
            database.close()

    def _delete_file(self) -> None:
        """Delete a damaged file, unless it was replaced already; the next use creates it again."""
        if self._file_id in (None, _file_id(self._path)):
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self._path.with_name(FILE_NAME + suffix).unlink()


def _file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, or None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _is_damaged(error: BaseException) -> bool:
    """Whether the file is damaged, rather than the disk full, access denied or the file locked."""
    return type(error) is sqlite3.DatabaseError


def _is_locked(error: BaseException) -> bool:
    """Whether another connection has locked the file."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _select(
    database: sqlite3.Connection, keys: Sequence[bytes], oldest_s: float
) -> list[bytes | None]:
    slots = ",".join("?" * len(keys))
    query = f"SELECT key, value FROM vectors WHERE key IN ({slots}) AND written_s >= ?"  # noqa: S608
    values = dict(database.execute(query, (*keys, oldest_s)).fetchall())
    return [values.get(key) for key in keys]


def _insert(database: sqlite3.Connection, values: Sequence[KeyValue], max_pages: int) -> int:
    """Write the values and return the bytes in use then."""
    now_s = int(time.time())
    needed = sum(len(value) // PAGE_BYTES + 1 for _, value in values)
    database.execute("BEGIN IMMEDIATE")
    try:
        while _used_pages(database) + needed > max_pages and _evict(database):
            pass
        database.executemany(
            "INSERT OR REPLACE INTO vectors (key, written_s, value) VALUES (?, ?, ?)",
            [(key, now_s, value) for key, value in values],
        )
        used = _used_pages(database)
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    return used * PAGE_BYTES


def _clear(database: sqlite3.Connection) -> None:
    for statement in ("DELETE FROM vectors", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
        database.execute(statement).fetchall()


def _used_pages(database: sqlite3.Connection) -> int:
    counts = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count")
    )
    return next(counts) - next(counts)


def _evict(database: sqlite3.Connection) -> bool:
    """Delete the oldest values; whether there were any."""
    deleted = database.execute(
        "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY id LIMIT ?)",
        (EVICTED_ROWS,),
    )
    return deleted.rowcount > 0
