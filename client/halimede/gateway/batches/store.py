"""Files and batches on disk, as OpenAI describes them.

A file is `files/ID.json` and `files/ID.data`; it exists as soon as its JSON does. A batch is
`batches/ID.json`, which only the process that holds `batches/ID.lock` rewrites, and
`batches/ID.cancel` once somebody cancels it. Ids begin with the time, so their order is that of
their making.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from halimede.gateway.errors import Problem

WINDOW_S = 24 * 3600
"""Seconds after which a batch ends, answered or not."""
MAX_METADATA = 16
"""Maximum pairs of a batch's metadata."""
FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
FINAL = ("failed", "completed", "expired", "cancelled")
"""Statuses of a batch that has ended."""
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip


class StoredFile(BaseModel):
    """A file, in OpenAI's fields and the key that it belongs to."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    key_id: str


class Counts(BaseModel):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(BaseModel):
    """Why a batch failed."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(BaseModel):
    """A batch, in OpenAI's fields and those of HIDDEN."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: dict[str, Any] | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Field(default_factory=Counts)
    metadata: dict[str, str] | None = None

    key_id: str
    space: str | None = None
    """The only space that the caller takes answers of."""
    answers_id: str
    """Id of the file of answers, from its first line on."""
    failures_id: str
    """Id of the file of lines that failed, from its first line on."""

    def fail(self, code: str, message: str) -> None:
        """End the batch without an answer."""
        error = BatchError(code=code, message=message)
        self.errors = {"object": "list", "data": [error.model_dump()]}
        self.enter("failed")

    def enter(self, status: Status) -> None:
        """Change the status, and note when."""
        self.status = status
        setattr(self, f"{status}_at", now())


HIDDEN = frozenset(("key_id", "space", "answers_id", "failures_id"))
"""Fields of files and batches that are not in OpenAI's."""
S = TypeVar("S", StoredFile, Batch)


class Store:
    """The files and batches of a folder. Every method may read or write the disk."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "files"
        self.batches = folder / "batches"
        for each in (self.files, self.batches):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add_file(self, source: IO[bytes], filename: str, purpose: str, key_id: str) -> StoredFile:
        """Store a file.

        Raises:
            Problem: it cannot be written.
        """
        id_ = new_id("file-")
        with _writing():
            with self.data(id_).open("xb") as target:
                shutil.copyfileobj(source, target)
            return self.publish(id_, filename, purpose, key_id)

    def publish(self, id_: str, filename: str, purpose: str, key_id: str) -> StoredFile:
        """Let a file exist whose data is there."""
        file = StoredFile(
            id=id_,
            bytes=self.data(id_).stat().st_size,
            created_at=now(),
            filename=filename,
            purpose=purpose,
            key_id=key_id,
        )
        _replace(self.files / f"{id_}.json", file)
        return file

    def file(self, id_: str, key_id: str) -> StoredFile:
        """Return a file of a key.

        Raises:
            Problem: it has none of this id.
        """
        if FILE_ID.fullmatch(id_):
            file = _read(self.files / f"{id_}.json", StoredFile)
            if file is not None and file.key_id == key_id:
                return file
        raise Problem(404, "there is no file of this id. /v1/files lists yours.")

    def delete_file(self, id_: str, key_id: str) -> None:
        """Delete a file of a key.

        Raises:
            Problem: it has none of this id.
        """
        self.file(id_, key_id)
        (self.files / f"{id_}.json").unlink(missing_ok=True)
        self.data(id_).unlink(missing_ok=True)

    def all_files(self, key_id: str) -> list[StoredFile]:
        """Return the files of a key, the newest first."""
        return [file for file in _all(self.files, StoredFile) if file.key_id == key_id]

    def data(self, id_: str) -> Path:
        """Path of the bytes of a file."""
        return self.files / f"{id_}.data"

    def add_batch(self, batch: Batch) -> None:
        """Store a new batch.

        Raises:
            Problem: it cannot be written.
        """
        with _writing():
            self.save(batch)

    def save(self, batch: Batch) -> None:
        """Write a batch."""
        _replace(self.batches / f"{batch.id}.json", batch)

    def batch(self, id_: str, key_id: str) -> Batch:
        """Return a batch of a key.

        Raises:
            Problem: it has none of this id.
        """
        batch = self.any_batch(id_) if BATCH_ID.fullmatch(id_) else None
        if batch is None or batch.key_id != key_id:
            raise Problem(404, "there is no batch of this id. /v1/batches lists yours.")
        return batch

    def any_batch(self, id_: str) -> Batch | None:
        """Return a batch, whosoever it is."""
        batch = _read(self.batches / f"{id_}.json", Batch)
        if batch is not None and batch.status not in FINAL and self.cancelled_at(id_):
            batch.status, batch.cancelling_at = "cancelling", self.cancelled_at(id_)
        return batch

    def all_batches(self, key_id: str) -> list[Batch]:
        """Return the batches of a key, the newest first."""
        ids = sorted((path.stem for path in self.batches.glob("*.json")), reverse=True)
        batches = (self.any_batch(id_) for id_ in ids)
        return [batch for batch in batches if batch is not None and batch.key_id == key_id]

    def batch_ids(self) -> list[str]:
        """Return the ids of all batches, the oldest first."""
        return sorted(path.stem for path in self.batches.glob("*.json"))

    def cancel(self, id_: str) -> None:
        """Ask whoever runs a batch to end it."""
        (self.batches / f"{id_}.cancel").touch(mode=0o600)

    def cancelled_at(self, id_: str) -> int | None:
        """Return the Unix time at which a batch was cancelled; None if it was not."""
        try:
            return int((self.batches / f"{id_}.cancel").stat().st_mtime)
        except OSError:
            return None

    def lock(self, id_: str) -> Path:
        """Path of the lock of whoever runs a batch."""
        return self.batches / f"{id_}.lock"


def shown(stored: BaseModel) -> dict[str, Any]:
    """Return OpenAI's fields of a file or batch."""
    return stored.model_dump(exclude=set(HIDDEN))


def page(
    rows: Sequence[S], after: str | None, limit: int, *, oldest_first: bool = False
) -> dict[str, Any]:
    """Return the part of a list that follows an id, as OpenAI's lists. `rows` has the newest first.

    The id itself need not be there any more.
    """
    rows = rows[::-1] if oldest_first else rows
    if after is not None:
        rows = [row for row in rows if (row.id > after if oldest_first else row.id < after)]
    part = rows[:limit]
    return {
        "object": "list",
        "data": [shown(row) for row in part],
        "first_id": part[0].id if part else None,
        "last_id": part[-1].id if part else None,
        "has_more": len(rows) > limit,
    }


def new_id(prefix: str) -> str:
    """Return an id that nobody guesses, later than those made before."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def now() -> int:
    """Return the Unix time in whole seconds."""
    return int(time.time())


def _all(folder: Path, kind: type[S]) -> list[S]:
    paths = sorted(folder.glob("*.json"), reverse=True)
    return [stored for path in paths if (stored := _read(path, kind)) is not None]


def _read(path: Path, kind: type[S]) -> S | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):  # it is not there any more, or is damaged
        return None


def _replace(path: Path, stored: BaseModel) -> None:
    """Write JSON so that a reader has either the old or the new."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    part.write_text(stored.model_dump_json())
    part.replace(path)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise Problem(
            507, "the gateway cannot store this now. Is there space in gateway.files?"
        ) from None
