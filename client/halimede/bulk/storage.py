"""Files of a job, on this machine or behind an fsspec URL such as s3://bucket/folder."""

from __future__ import annotations

import contextlib
import glob
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from halimede.extras import import_optional
from halimede_ops.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

EXTRA = "bulk"
CHANGED = ("ETag", "etag", "md5Hash", "content_hash", "mtime", "LastModified", "last_modified")
"""Facts of a file that change with its content, the first that a file system tells is used."""


class Place(NamedTuple):
    """A file or folder in a file system."""

    files: AbstractFileSystem
    path: str
    """As the file system names it, without protocol."""

    @property
    def url(self) -> str:
        """The whole address: the path itself on this machine."""
        return self.path if self.is_local else str(self.files.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return "file" in _protocols(self.files)

    def child(self, name: str) -> Place:
        """Return the file of this name in the folder."""
        return Place(self.files, f"{self.path.rstrip('/')}/{name}")

    def identity(self) -> dict[str, Any]:
        """Return the size, and what changes with the content, where the file system tells it."""
        info = self.files.info(self.path)
        changed = next((str(info[key]) for key in CHANGED if info.get(key) is not None), "")
        return {"size_bytes": int(info["size"] or 0), "changed": changed}

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file in a folder. A folder that does not exist has none."""
        self.files.invalidate_cache()
        try:
            files = self.files.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {Place(self.files, file["name"]).name: int(file["size"] or 0) for file in files}

    @contextlib.contextmanager
    def replaced(self) -> Iterator[IO[bytes]]:
        """Write a file beside this one, and give it this name when it is whole.

        What fails leaves no file, and what is killed leaves a name that begins with a dot.
        """
        beside = Place(self.files, f"{self._folder}/.{self.name}.{uuid.uuid4().hex[:8]}")
        try:
            with beside.files.open(beside.path, "wb") as file:
                yield file
                file.flush()
                if self.is_local:
                    os.fsync(file.fileno())
            self.files.mv(beside.path, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.files.rm(beside.path)
            raise

    @property
    def _folder(self) -> str:
        return self.path.rstrip("/").rpartition("/")[0]


def place(address: str) -> Place:
    """Return the place of a path or URL.

    Raises:
        InvalidInput: no file system has this protocol.
        MissingExtra: a package of the file system is not installed.
    """
    fsspec = import_optional("fsspec", EXTRA)
    protocol = address.partition("://")[0] if "://" in address else "file"
    try:
        files, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingExtra(f"{protocol}:// cannot be read or written: {error}") from None
    except ValueError as error:
        raise InvalidInput(f"{protocol}:// is not a protocol of fsspec: {error}") from None
    return Place(files, path)


def expand(addresses: Sequence[str], suffixes: Sequence[str]) -> list[Place]:
    """Return the files of paths, URLs, folders and patterns; those of a folder sorted by path.

    Of a folder, the files are taken whose names end with one of the suffixes and do not begin
    with `.` or `_`, in its subfolders too.

    Raises:
        InvalidInput: an address has no file, or a file is given twice.
    """
    places: list[Place] = []
    for address in addresses:
        found = list(_expanded(place(address), suffixes))
        if not found:
            raise InvalidInput(f"SOURCE {address} has no file ending with {', '.join(suffixes)}.")
        places += found
    seen: set[str] = set()
    for one in places:
        if one.url in seen:
            raise InvalidInput(f"SOURCE {one.url} is given twice.")
        seen.add(one.url)
    return places


def _expanded(given: Place, suffixes: Sequence[str]) -> Iterator[Place]:
    files, path = given
    if files.isfile(path):
        yield given
    elif files.isdir(path):
        for child in sorted(files.find(path)):
            within = child[len(path) :].split("/")
            is_hidden = any(part.startswith((".", "_")) for part in within)
            if child.endswith(tuple(suffixes)) and not is_hidden:
                yield Place(files, child)
    elif glob.has_magic(path):
        yield from (Place(files, child) for child in sorted(files.glob(path)))
    else:
        raise InvalidInput(f"SOURCE {given.url} does not exist.")


def _protocols(files: AbstractFileSystem) -> Sequence[str]:
    return (files.protocol,) if isinstance(files.protocol, str) else files.protocol
