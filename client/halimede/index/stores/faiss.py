"""FAISS: the record is a file beside the index, `FILE.halimede.json`.

It has the fingerprint of the index file that it is about, so that the record of a file that was
replaced is not believed. While an index is written, the record has the fingerprints of the old and
of the new file: whichever a killed writer leaves is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.index.record import SpaceRecord
from halimede.index.stores.base import PACKED, Match, Page
from halimede_ops.errors import InvalidInput, SpaceRefused

EXTRA = "index-faiss"
OPTIONS = ()
SUFFIX = ".halimede.json"
BLOCK_BYTES = 64 * 1024
BLOCKS = 64
"""Blocks of an index file in its fingerprint. An index of other vectors differs in each."""
TRIES = 3
"""A writer may replace index and record between two reads of them."""


class Faiss:
    """The file of a FAISS index. Its rows have ids: the index is an IndexIDMap2."""

    keeps_texts = False
    packed = ()
    fields_type = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sidecar = path.with_name(f"{path.name}{SUFFIX}")
        self._faiss = import_optional("faiss", EXTRA)
        self._loaded: tuple[tuple[int, int, int], Any] | None = None
        self._held: Any = None
        """The index that is being filled, and not yet written."""
        if path.is_dir() or not path.parent.is_dir():
            raise InvalidInput(
                f"{path} can be no file of FAISS; give a file in an existing folder."
            )

    @property
    def name(self) -> str:
        """As `Store.name`."""
        return f"the FAISS index {self._path.name!r}"

    def refresh(self) -> None:
        """As `Store.refresh`: it always does."""

    def read(self) -> SpaceRecord | None:
        """As `Store.read`.

        Raises:
            SpaceRefused: the index file was replaced or changed without its record.
        """
        for _ in range(TRIES):
            facts = self._facts()
            if facts is None:
                return None
            if not self._path.exists() or fingerprint(self._path) in facts["files"]:
                break
        else:
            raise SpaceRefused(
                f"{self.name} has changed since its record was written. If its vectors are still "
                "of the same space, run `halimede index adopt --replace`. Write an index of your "
                "own with `guard.store.save(index)`."
            )
        return SpaceRecord.from_json(json.dumps(facts["record"]), self.name)

    def claim(self, record: SpaceRecord) -> SpaceRecord:
        """As `Store.claim`: the file is created by one writer alone."""
        beside = self._write_facts(record, self._fingerprints())
        try:
            os.link(beside, self._sidecar)
        except FileExistsError:
            there = self.read()
            return record if there is None else there
        finally:
            beside.unlink()
        return record

    def replace(self, record: SpaceRecord) -> None:
        """As `Store.replace`."""
        self._write_facts(record, self._fingerprints()).replace(self._sidecar)

    def count(self) -> int:
        """As `Store.count`."""
        index = self._index()
        return 0 if index is None else int(index.ntotal)

    def width(self) -> int | None:
        """As `Store.width`."""
        index = self._index()
        return None if index is None else int(index.d)

    def write(self, page: Page) -> None:
        """As `Store.write`. An index that does not exist is an exact one, of inner products.

        Raises:
            InvalidInput: the index has no ids, or cannot remove the rows to replace.
        """
        if self._held is not None:
            self._add(self._held, page)
            return
        with self._lock():
            record = self.read()
            index = self._index()
            if index is None:
                index = self._exact(np.asarray(page.vectors).shape[1])
            self._loaded = None
            self._add(index, page)
            if record is not None:
                self._save(index, record)

    def save(self, index: Any, record: SpaceRecord | None = None) -> None:
        """Write an index of your own with its record. Default: the record that is there.

        Its vectors must have passed `Guard.checked`.

        Raises:
            InvalidInput: there is no record.
        """
        with self._lock():
            facts = self._facts()
            if record is None and facts is not None:
                record = SpaceRecord.from_json(json.dumps(facts["record"]), self.name)
            if record is None:
                raise InvalidInput(
                    f"{self.name} has no record; give `SpaceRecord.of(result)` of its vectors."
                )
            self._loaded = None
            self._save(index, record)

    def query(self, vectors: np.ndarray, k: int) -> list[list[Match]]:
        """As `Store.query`: `score` is the distance, or the inner product."""
        index = self._index()
        if index is None:
            return [[] for _ in vectors]
        scores, ids = index.search(np.ascontiguousarray(vectors, np.float32), k)
        return [
            [Match(int(row), float(score)) for row, score in zip(*both, strict=True) if row >= 0]
            for both in zip(ids, scores, strict=True)
        ]

    def pages(self, size: int) -> Iterator[Page]:
        """As `Store.pages`.

        Raises:
            InvalidInput: always.
        """
        raise self._no_texts()

    def sample(self, count: int) -> Page:
        """As `Store.sample`.

        Raises:
            InvalidInput: always.
        """
        raise self._no_texts()

    @contextlib.contextmanager
    def created(self, name: str, record: SpaceRecord) -> Iterator[Faiss]:
        """As `Store.created`: an exact index of this one's metric; `name` is its file.

        What is trained of an index (IVF, PQ) belongs to a space, and is not copied.
        """
        new = Faiss(Path(name))
        if record.output_type in PACKED:
            raise InvalidInput(f"{new.name} does not take {record.output_type}.")
        new.claim(record).check(record, new.name, "the new vectors")
        there, own = new._index(), self._index()
        metric = self._faiss.METRIC_INNER_PRODUCT if own is None else own.metric_type
        new._held = self._exact(record.dims, metric) if there is None else there
        yield new
        index, new._held, new._loaded = new._held, None, None
        with new._lock():
            new._save(index, record)

    def close(self) -> None:
        """As `Store.close`: nothing is open."""

    def _facts(self) -> dict[str, Any] | None:
        try:
            facts = json.loads(self._sidecar.read_text())
            return {"record": facts["record"], "files": list(facts["files"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise InvalidInput(f"{self._sidecar} is damaged. Delete it.") from None

    def _write_facts(self, record: SpaceRecord, files: Sequence[str]) -> Path:
        """Write a file beside the sidecar, and return its path."""
        beside = self._sidecar.with_name(f".{self._sidecar.name}.{os.urandom(4).hex()}")
        facts = {"record": json.loads(record.to_json()), "files": list(files)}
        with beside.open("w") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        return beside

    def _fingerprints(self) -> list[str]:
        return [fingerprint(self._path)] if self._path.exists() else []

    def _index(self) -> Any:
        """Return the index of the file, read again if the file changed. None: there is no file."""
        if self._held is not None:
            return self._held
        if not self._path.exists():
            return None
        file = self._path.stat()
        mark = file.st_ino, file.st_mtime_ns, file.st_size
        if self._loaded is None or self._loaded[0] != mark:
            try:
                self._loaded = mark, self._faiss.read_index(str(self._path))
            except RuntimeError:
                raise InvalidInput(f"{self._path} is no index of FAISS.") from None
        return self._loaded[1]

    def _exact(self, dims: int, metric: int | None = None) -> Any:
        metric = self._faiss.METRIC_INNER_PRODUCT if metric is None else metric
        return self._faiss.IndexIDMap2(self._faiss.IndexFlat(dims, metric))

    def _add(self, index: Any, page: Page) -> None:
        if not hasattr(index, "id_map"):
            raise InvalidInput(
                f"{self.name} is {type(index).__name__}, which has no ids; wrap it in "
                "faiss.IndexIDMap2."
            )
        ids = np.array([int(row) for row in page.ids], np.int64)
        known = np.isin(ids, self._faiss.vector_to_array(index.id_map))
        try:
            if known.any():
                index.remove_ids(ids[known])
        except RuntimeError:
            raise InvalidInput(
                f"{self.name} cannot replace rows, and has {int(known.sum())} of these ids. Give "
                "new ids."
            ) from None
        index.add_with_ids(np.ascontiguousarray(page.vectors, np.float32), ids)

    def _save(self, index: Any, record: SpaceRecord) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.urandom(4).hex()}")
        try:
            self._faiss.write_index(index, str(beside))
            new = fingerprint(beside)
            both = [*self._fingerprints(), new]
            self._write_facts(record, both).replace(self._sidecar)
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)
        self._write_facts(record, [new]).replace(self._sidecar)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Let one process at a time write the index."""
        filelock = import_optional("filelock", EXTRA)
        with filelock.FileLock(f"{self._sidecar}.lock"):
            yield

    def _no_texts(self) -> InvalidInput:
        return InvalidInput(
            f"{self.name} keeps no texts. Give their file: `--texts FILE` with the columns id and "
            "text."
        )


def fingerprint(path: Path) -> str:
    """Return the size of a file and the digest of blocks from all of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in sorted(
            {int(one) for one in np.linspace(0, max(0, size - BLOCK_BYTES), BLOCKS)}
        ):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return f"{size}-{digest.hexdigest()}"


def of(path: Path, name: str | None) -> Faiss:
    """Return the index in a file.

    Raises:
        InvalidInput: it is an index in memory, or a name is given.
    """
    if not isinstance(path, Path):
        raise InvalidInput(
            f"{type(path).__name__} is an index in memory; give its file: "
            'halimede.guard("vectors.faiss").'
        )
    if name is not None:
        raise InvalidInput("a FAISS index is a file; give no name of a collection.")
    return Faiss(path.expanduser())
