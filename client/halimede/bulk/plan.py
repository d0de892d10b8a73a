"""What a job does: its sources cut into parts, and the types of the columns that are copied."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from halimede.bulk.manifest import BulkOptions, SourceRecord
from halimede.bulk.rows import TEXT, Rows, open_rows
from halimede.bulk.storage import EXTRA, Place
from halimede.extras import import_optional
from halimede_ops.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 64 * 1024 * 1024
"""Bytes of the source at which a part ends: all of it is in memory."""
SOURCE, ROW, CHUNK, START, END = "source", "row", "chunk", "start", "end"
VECTOR, TOKENS, TRUNCATED, ERROR = "vector", "tokens", "truncated", "error"
WRITTEN = (CHUNK, START, END, VECTOR, TOKENS, TRUNCATED, ERROR)
"""Columns that a job writes beside those of the source."""


def with_defaults(options: BulkOptions) -> BulkOptions:
    """Return the options with the column of the texts.

    Raises:
        InvalidInput: two options exclude each other.
    """
    if options.text_column is None and options.image_column is None:
        options = options.model_copy(update={"text_column": TEXT})
    if options.chunk_tokens is None and (options.late or options.chunk_overlap):
        raise InvalidInput("--overlap and --late are for chunks; give --chunk TOKENS too.")
    if options.chunk_tokens is not None and options.image_column is not None:
        raise InvalidInput("--chunk is for texts; give it without --image-column.")
    if options.output_type in ("int8", "uint8") and options.ranges is None:
        raise InvalidInput(f"--output-type {options.output_type} needs --ranges.")
    return options


def plan(sources: Sequence[Place], options: BulkOptions) -> tuple[list[SourceRecord], pa.Schema]:
    """Read the sources once: count and cut their rows, and find the types of the copied columns.

    Raises:
        InvalidInput: a source is damaged, or lacks a column.
    """
    pyarrow = import_optional("pyarrow", EXTRA)
    records, schemas = [], []
    for source in sources:
        identity = source.identity()
        with contextlib.closing(open_rows(source)) as rows:
            names = copied(rows, options, source.url)
            parts = list(rows.parts(options.rows_per_file, PART_BYTES))
            schemas.append(rows.schema(parts, names))
        count = sum(part.rows for part in parts)
        records.append(SourceRecord(url=source.url, rows=count, parts=parts, **identity))
    try:
        schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise InvalidInput(f"a column has another type in another source: {error}") from None
    return records, schema


def copied(rows: Rows, options: BulkOptions, name: str) -> list[str]:
    """Return the columns of a source to copy: the id first.

    Raises:
        InvalidInput: a column that is asked for is not there, or would be written twice.
    """
    content = [c for c in (options.text_column, options.image_column) if c is not None]
    kept = [k for k in options.keep if k != "*"]
    if "*" in options.keep:
        kept = [column for column in rows.columns if column not in WRITTEN]
    ids = [] if options.id_column is None else [options.id_column]
    for column in (*content, *ids, *kept):
        if column not in rows.columns:
            raise InvalidInput(
                f"{name} has no column {column!r}; it has {', '.join(map(repr, rows.columns))}."
            )
        if list(rows.columns).count(column) > 1:
            raise InvalidInput(f"{name} has the column {column!r} twice.")
    wanted = list(dict.fromkeys((*ids, *kept)))
    taken = WRITTEN if ids else (*WRITTEN, SOURCE, ROW)
    for column in wanted:
        if column in taken:
            raise InvalidInput(f"column {column!r} is one that the job writes; do not keep it.")
    return wanted


def schema_text(schema: pa.Schema) -> str:
    """Return a schema as text."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_of(text: str) -> pa.Schema:
    """Return the schema of such a text."""
    pyarrow = import_optional("pyarrow", EXTRA)
    return pyarrow.ipc.read_schema(pyarrow.py_buffer(base64.b64decode(text)))
