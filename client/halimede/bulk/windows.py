"""Windows of rows: what is embedded in one call, and the table that is written of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halimede.bulk.plan import (
    CHUNK,
    END,
    ERROR,
    ROW,
    SOURCE,
    START,
    TOKENS,
    TRUNCATED,
    VECTOR,
)
from halimede.bulk.rows import Read
from halimede.bulk.storage import EXTRA
from halimede.extras import import_optional
from halimede.results import UNKNOWN_TOKENS

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS, IMAGES = 4096, 64
"""Rows of a window: texts are sorted by length together, images are large."""
WINDOW_BYTES = 8 * 1024 * 1024
"""Bytes of texts at which a window ends."""


class Window(NamedTuple):
    """Rows that are embedded in one call."""

    values: Sequence[Any]
    """A text, an image, or a pair of both; None where a row has none."""
    columns: pa.Table
    """The columns that are copied, and those that say where a row comes from."""
    errors: Mapping[int, str]
    """Row → why it is not embedded."""
    rows: Sequence[int]
    """For each row its number in the source."""


class Span(NamedTuple):
    """A part of a text."""

    text: str
    start: int
    end: int


class Vectors(NamedTuple):
    """The vectors of a window."""

    vectors: np.ndarray
    """`[rows, width]`: zeros where there is an error."""
    tokens: np.ndarray
    """`[rows]` int32."""
    truncated: np.ndarray
    """`[rows]` bool."""
    errors: Mapping[int, str]
    """Row → why it has no vector."""
    versions: frozenset[int] = frozenset()
    """Versions of the model that answered."""


def cut(
    read: Read, values: Sequence[Any], columns: pa.Table, first_row: int, most: int
) -> Iterator[Window]:
    """Cut a part into windows of at most `most` rows, ended when they reach WINDOW_BYTES."""
    start = 0
    while start < len(values):
        end, size_bytes = start, 0
        while end < min(len(values), start + most) and size_bytes < WINDOW_BYTES:
            size_bytes += _size_bytes(values[end])
            end += 1
        errors = {
            row - start: read.damaged.get(row, f"row {first_row + row} has nothing to embed.")
            for row in range(start, end)
            if values[row] is None
        }
        rows = range(first_row + start, first_row + end)
        yield Window(values[start:end], columns.slice(start, end - start), errors, rows)
        start = end


def chunked(window: Window, chunk: Callable[[str], Sequence[Any]], is_late: bool) -> Window:
    """Return the window of the chunks of a window's texts; a row without a text is one row.

    With late chunking its values are spans of whole texts.
    """
    pyarrow = import_optional("pyarrow", EXTRA)
    values: list[str | Span | None] = []
    rows: list[int] = []
    places: list[tuple[int, int | None, int | None]] = []
    errors = {}
    for row, text in enumerate(window.values):
        pieces = [] if text is None else chunk(text)
        if text is None or (is_late and not any(piece.text for piece in pieces)):
            nothing = f"row {window.rows[row]} has nothing to embed."
            errors[len(values)] = window.errors.get(row, nothing)
            values.append(None)
            rows.append(row)
            places.append((0, None, None))
            continue
        for number, piece in enumerate(pieces or [Span(text, 0, len(text))]):
            values.append(Span(text, piece.start, piece.end) if is_late else piece.text)
            rows.append(row)
            places.append((number, piece.start, piece.end))
    columns = window.columns.take(pyarrow.array(rows, pyarrow.int64()))
    kinds = (pyarrow.int32(), pyarrow.int64(), pyarrow.int64())
    for place, (name, kind) in enumerate(zip((CHUNK, START, END), kinds, strict=True)):
        column = pyarrow.array([one[place] for one in places], kind)
        columns = columns.append_column(name, column)
    return Window(values, columns, errors, [window.rows[row] for row in rows])


def table_of(window: Window, done: Vectors, schema: pa.Schema) -> pa.Table:
    """Return what is written of a window."""
    pyarrow = import_optional("pyarrow", EXTRA)
    missing = np.zeros(len(window.values), np.bool_)
    missing[list(done.errors)] = True
    vectors = _lists(done.vectors, missing, schema.field(VECTOR).type)
    is_unknown = missing | (done.tokens == UNKNOWN_TOKENS)
    written = {
        VECTOR: vectors,
        TOKENS: pyarrow.array(done.tokens, mask=is_unknown),
        TRUNCATED: pyarrow.array(done.truncated, mask=is_unknown),
        ERROR: pyarrow.array(
            [done.errors.get(row) for row in range(len(missing))], pyarrow.string()
        ),
    }
    columns = window.columns
    for field in schema:
        if field.name in written:
            columns = columns.append_column(field, written[field.name])
    return columns.select(schema.names).cast(schema)


def located(columns: pa.Table, source: int, first_row: int) -> pa.Table:
    """Return the columns with the source and the row that each row comes from before them."""
    pyarrow = import_optional("pyarrow", EXTRA)
    rows = np.arange(first_row, first_row + len(columns))
    sources = np.full(len(columns), source, np.int32)
    columns = columns.add_column(0, SOURCE, pyarrow.array(sources))
    return columns.add_column(1, ROW, pyarrow.array(rows))


def output_schema(
    copied: pa.Schema,
    *,
    has_id: bool,
    is_chunked: bool,
    collects: bool,
    value_type: np.dtype[Any],
    width: int,
) -> pa.Schema:
    """Return the columns of the output. A vector has `width` values of `value_type`.

    A column that may have nulls has no fixed size: pyarrow before 26 writes those, and cannot read
    them. In Parquet both are the same.
    """
    pyarrow = import_optional("pyarrow", EXTRA)
    value = pyarrow.from_numpy_dtype(value_type)
    fields = [] if has_id else [(SOURCE, pyarrow.int32()), (ROW, pyarrow.int64())]
    fields += [(field.name, field.type) for field in copied]
    if is_chunked:
        fields += [(CHUNK, pyarrow.int32()), (START, pyarrow.int64()), (END, pyarrow.int64())]
    fields += [
        (VECTOR, pyarrow.list_(value, -1 if collects else width)),
        (TOKENS, pyarrow.int32()),
        (TRUNCATED, pyarrow.bool_()),
    ]
    if collects:
        fields.append((ERROR, pyarrow.string()))
    return pyarrow.schema(fields)


def _size_bytes(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return sum(map(_size_bytes, value)) if isinstance(value, tuple) else 0


def _lists(vectors: np.ndarray, missing: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return vectors as lists, null where one is missing."""
    pyarrow = import_optional("pyarrow", EXTRA)
    width = vectors.shape[1]
    if pyarrow.types.is_fixed_size_list(kind):
        return pyarrow.FixedSizeListArray.from_arrays(vectors.reshape(-1), width)
    ends = np.cumsum(np.where(missing, 0, width))
    offsets = pyarrow.array(np.concatenate([[0], ends]).astype(np.int32))
    values = pyarrow.array(vectors[~missing].reshape(-1))
    return pyarrow.ListArray.from_arrays(offsets, values, mask=pyarrow.array(missing))
