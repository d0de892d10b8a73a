"""Values in an SQLite file, shared by any number of processes.

SQLite comes with Python, tells a broken file from a whole one instead of crashing on it, and
lets readers go on while one process writes (write-ahead log). A power cut may break the file,
as nothing waits for the disk: then it is made anew, and each value has its own checksum.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import tenacity

from halimede.cache.tier import Item
from halimede_ops.errors import InvalidInput

FILE_NAME = "vectors-1.sqlite"
PAGE_BYTES = 8192
"""Five vectors of 384 dims fill 97 % of a page."""
LOG_BYTES = 2 * 1024 * 1024
"""Size of the write-ahead log at which it is merged into the file."""
MIN_BYTES = 16 * 1024 * 1024
EVICTED_ROWS = 256

SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (
    id INTEGER PRIMARY KEY, -- grows with each write: the lowest was written first
    key BLOB NOT NULL UNIQUE,
    written_s INTEGER NOT NULL,
    value BLOB NOT NULL
)
"""

Result = TypeVar("Result")


class Disk:
    """Values in a folder, of at most `max_bytes` together; those written first leave first."""

    def __init__(
        self,
        folder: Path | str,
        max_bytes: int,
        ttl_s: float | None = None,
        *,
        name: str = "disk",
        timeout_s: float = 1.0,
    ) -> None:
        """Name the folder; it is made at the first use, for this user alone.

        Raises:
            InvalidInput: `max_bytes` is below MIN_BYTES.
        """
        if max_bytes < MIN_BYTES:
            raise InvalidInput(f"max_bytes is {max_bytes}; a disk tier needs {MIN_BYTES} or more.")
        self.name = name
        self.timeout_s = timeout_s
        self.ttl_s = ttl_s
        path = Path(folder) / FILE_NAME
        # The log may grow to twice its limit while another process reads.
        pages = (max_bytes - 2 * LOG_BYTES) // PAGE_BYTES
        self._reads = _Connection(path, pages, timeout_s)
        self._writes = _Connection(path, pages, timeout_s)
        self._size_bytes: int | None = None

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the pages in use at the last write of this process; None before it."""
        return self._size_bytes

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Each key's value, or None when it is unknown or older than `ttl_s`."""
        oldest_s = 0 if self.ttl_s is None else time.time() - self.ttl_s
        return await self._reads.run(lambda database: _select(database, keys, oldest_s))

    async def put(self, items: Sequence[Item]) -> None:
        """Hold the values; what was written first leaves."""
        self._size_bytes = await self._writes.run(
            lambda database: _insert(database, items, self._writes.pages)
        )

    async def clear(self) -> None:
        """Forget every value, of other processes too; nothing of them stays in the file."""
        await self._writes.run(_clear)
        self._size_bytes = 0

    async def close(self) -> None:
        """Close the file."""
        await self._reads.close()
        await self._writes.close()


class _Connection:
    """One connection in its own thread, opened at the first use and again after an error."""

    def __init__(self, path: Path, pages: int, timeout_s: float) -> None:
        self.pages = pages
        self._path = path
        self._timeout_s = timeout_s
        self._database: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="halimede-disk")

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._work, work)

    async def close(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        except RuntimeError:  # closed before
            return
        self._thread.shutdown(wait=False)

    def _work(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return work(self._connect())
        except BaseException as error:
            self._disconnect()
            if _is_broken(error):
                self._start_anew()
            raise

    def _connect(self) -> sqlite3.Connection:
        if self._database is not None and self._file != _identity(self._path):
            self._disconnect()  # another connection made the file anew, or someone removed it
        if self._database is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
            )
            self._file = _identity(self._path)
            for setting, value in (
                ("page_size", PAGE_BYTES),
                ("synchronous", "off"),
                ("wal_autocheckpoint", LOG_BYTES // PAGE_BYTES),
                ("journal_size_limit", LOG_BYTES),
                ("max_page_count", self.pages),
            ):
                self._database.execute(f"PRAGMA {setting}={value}")
            self._use_log(self._database)
            self._database.execute(SCHEMA)
        return self._database

    def _use_log(self, database: sqlite3.Connection) -> None:
        """Have a write-ahead log; SQLite itself does not wait where two connections ask for it."""
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

    def _start_anew(self) -> None:
        """Remove a file that is no database any more; it is made again at the next use."""
        if self._file in (None, _identity(self._path)):
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self._path.with_name(FILE_NAME + suffix).unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, or None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _is_broken(error: BaseException) -> bool:
    """Whether the file itself is at fault, and not its disk, its permissions or another process."""
    return type(error) is sqlite3.DatabaseError


def _is_locked(error: BaseException) -> bool:
    """Whether another connection holds the file; an error has a code from Python 3.11 on only."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _select(
    database: sqlite3.Connection, keys: Sequence[bytes], oldest_s: float
) -> list[bytes | None]:
    slots = ",".join("?" * len(keys))
    query = f"SELECT key, value FROM vectors WHERE key IN ({slots}) AND written_s >= ?"  # noqa: S608
    found = dict(database.execute(query, (*keys, oldest_s)).fetchall())
    return [found.get(key) for key in keys]


def _insert(database: sqlite3.Connection, items: Sequence[Item], pages: int) -> int:
    """Bytes in use after the items are written."""
    now_s = int(time.time())
    needed = sum(len(value) // PAGE_BYTES + 1 for _, value in items)
    database.execute("BEGIN IMMEDIATE")
    try:
        while _used_pages(database) + needed > pages and _evict(database):
            pass
        database.executemany(
            "INSERT OR REPLACE INTO vectors (key, written_s, value) VALUES (?, ?, ?)",
            [(key, now_s, value) for key, value in items],
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
    """Whether there was something to remove."""
    removed = database.execute(
        "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY id LIMIT ?)",
        (EVICTED_ROWS,),
    )
    return removed.rowcount > 0
