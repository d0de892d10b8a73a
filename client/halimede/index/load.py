"""Vectors that `halimede bulk` wrote, into a new collection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from halimede.extras import import_optional
from halimede.index.export import EXTRA, FIELDS, ID, TEXT
from halimede.index.record import SpaceRecord
from halimede.index.stores.base import Page, Store
from halimede_ops.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

    from halimede.bulk import Manifest

VECTOR, ERROR = "vector", "error"
"""Columns that a job of bulk writes."""
ROWS_PER_WRITE = 1024


class Loaded(NamedTuple):
    """What was written into a new collection."""

    store: Store
    """The new collection."""
    record: SpaceRecord
    rows: int
    left_out: int
    """Rows that the job could not embed (`--errors collect`)."""


def load(
    store: Store,
    name: str,
    vectors: str,
    *,
    rows_per_write: int = ROWS_PER_WRITE,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Loaded:
    """Write the vectors of a job of `halimede bulk` into a new collection like this one.

    The new collection gets the record of the job, then the vectors. The old one stays as it is. A
    load that was ended is run again: PostgreSQL and FAISS keep nothing of it, and the other stores
    replace the rows that are there.

    Args:
        store: the old collection, of which distance, options and other columns are copied.
        name: collection, table or index file to write.
        vectors: folder or URL of the job's output, with the columns `id`, `text` and `fields` of
            an export (of FAISS, `id` alone).
        rows_per_write: rows that are written at once.
        on_rows: called with the rows that were written.

    Raises:
        InvalidInput: the job is not finished or lacks a column, or ids are not unique.
        SpaceRefused: the new collection exists, with another space.
    """
    manifest = read_job(vectors)
    record = record_of(manifest)
    with store.created(name, record) as new:
        rows = left_out = 0
        for table in _tables(vectors, manifest, rows_per_write):
            page, missing = _page(table, new.keeps_texts)
            left_out += missing
            if len(page):
                new.write(page)
            rows += len(page)
            on_rows(len(table))
        count = new.count()
        if count != rows:
            raise InvalidInput(
                f"{new.name} has {count} rows and {rows} were written: ids are not unique, or "
                "another program writes it."
            )
    return Loaded(new, record, rows, left_out)


def read_job(folder: str) -> Manifest:
    """Return the manifest of a finished job of `halimede bulk`.

    Raises:
        InvalidInput: there is none, or it is not finished.
    """
    import_optional("pyarrow", EXTRA)
    from halimede.bulk.manifest import read_manifest
    from halimede.bulk.storage import place

    manifest = read_manifest(place(folder))
    if manifest is None:
        raise InvalidInput(f"{folder} has no job of `halimede bulk`.")
    missing = manifest.names().keys() - manifest.files.keys()
    if missing:
        raise InvalidInput(
            f"the job in {folder} lacks {len(missing)} of {len(manifest.names())} files. Run "
            "`halimede bulk` again: it goes on where it stopped."
        )
    if manifest.options.id_column is None or manifest.options.chunk_tokens is not None:
        raise InvalidInput(
            f"the job in {folder} has no id for each vector. Run `halimede bulk` with --id-column, "
            "without --chunk."
        )
    return manifest


def record_of(manifest: Manifest) -> SpaceRecord:
    """Return the record of a job's vectors."""
    model = manifest.model
    facts = (model.space, model.precision, model.dims, manifest.options.output_type, model.name)
    return SpaceRecord(*facts)


def _tables(folder: str, manifest: Manifest, rows: int) -> Iterator[pa.Table]:
    """Read the files of a job, some rows at once, with the columns of an export.

    Raises:
        InvalidInput: a column is missing.
    """
    pyarrow = import_optional("pyarrow", EXTRA)
    parquet = import_optional("pyarrow.parquet", EXTRA)
    from halimede.bulk.storage import place

    for name in manifest.names():
        child = place(folder).child(name)
        with contextlib.ExitStack() as stack:
            reader = parquet.ParquetFile(stack.enter_context(child.files.open(child.path, "rb")))
            for batch in reader.iter_batches(rows):
                table = pyarrow.Table.from_batches([batch])
                yield table.rename_columns(
                    [ID if one == manifest.options.id_column else one for one in table.column_names]
                )


def _page(table: pa.Table, keeps_texts: bool) -> tuple[Page, int]:
    """Return the rows that have a vector, and the number of the others."""
    missing = 0
    if ERROR in table.column_names:
        failed = table.column(ERROR).is_valid()
        missing = int(np.count_nonzero(failed.to_numpy()))
        table = table.filter(table.column(ERROR).is_null())
    column = table.column(VECTOR).combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    ids = table.column(ID).to_pylist()
    if not keeps_texts:
        return Page(ids, vectors=vectors), missing
    for name in (TEXT, FIELDS):
        if name not in table.column_names:
            raise InvalidInput(
                f"the job has no column {name!r}. Run `halimede bulk` with --keep text,fields."
            )
    fields = [value or {} for value in table.column(FIELDS).to_pylist()]
    return Page(ids, table.column(TEXT).to_pylist(), fields, vectors), missing
