"""Rows of a source: where its parts begin, and the table of a part."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from halimede.bulk.storage import EXTRA, Place
from halimede.extras import import_optional
from halimede_ops.errors import InvalidInput
from halimede_ops.lines import BOM

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = "text"
"""Column of a file of plain text."""
LONGEST_FIELD = 2**31 - 1
"""Bytes of the longest field of CSV."""
TEXT_BYTES_UNKNOWN = 4096
"""Bytes of a row, where Parquet does not tell them."""


class Part(NamedTuple):
    """Rows of a source that follow each other: one file of the output."""

    first_row: int
    rows: int
    first_byte: int = 0
    """Where they begin in the source, decompressed. 0 for Parquet."""
    end_byte: int = 0


class Read(NamedTuple):
    """The rows of a part."""

    table: pa.Table
    damaged: Mapping[int, str]
    """Row of the table → why it could not be read. All its columns are null."""


class Rows(Protocol):
    """The rows of one source."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns."""
        ...

    def parts(self, max_rows: int, max_bytes: int) -> Iterator[Part]:
        """Cut the source into parts of at most `max_rows` rows, ended when they reach `max_bytes`.

        Raises:
            InvalidInput: the file is damaged.
        """
        ...

    def schema(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Schema:
        """Return the types that these columns have in all parts."""
        ...

    def content(self, name: str, *, is_image: bool) -> pa.Field:
        """Return the column of texts or images as it is read.

        Raises:
            InvalidInput: it has another type.
        """
        ...

    def read(self, part: Part, schema: pa.Schema, text: str | None = None) -> Read:
        """Return these columns of a part. It is fastest to read parts in their order.

        A column that the source lacks is null. Values of the column `text` must be strings.

        Raises:
            InvalidInput: the file is damaged.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Lines:
    """Plain text: a line is a row of one column. The other formats of lines differ in three
    methods.
    """

    def __init__(self, source: Place) -> None:
        self._name = source.url
        self._file: IO[bytes] = source.files.open(source.path, "rb", compression="infer")
        self._begin = len(BOM) if self._file.read(len(BOM)) == BOM else 0
        self._file.seek(self._begin)
        self.columns: Sequence[str] = self._header()

    def parts(self, max_rows: int, max_bytes: int) -> Iterator[Part]:
        """As `Rows.parts`."""
        self._file.seek(self._begin)
        first_row = rows = 0
        start = self._begin
        for end in self._row_ends():
            rows += 1
            if rows == max_rows or end - start >= max_bytes:
                yield Part(first_row, rows, start, end)
                first_row, rows, start = first_row + rows, 0, end
        if rows:
            yield Part(first_row, rows, start, end)

    def schema(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Schema:
        """As `Rows.schema`: all are strings, for text and CSV have no types."""
        pyarrow = import_optional("pyarrow", EXTRA)
        return pyarrow.schema([(name, pyarrow.string()) for name in columns])

    def content(self, name: str, *, is_image: bool) -> pa.Field:
        """As `Rows.content`: always strings."""
        pyarrow = import_optional("pyarrow", EXTRA)
        return pyarrow.field(name, pyarrow.string())

    def read(self, part: Part, schema: pa.Schema, text: str | None = None) -> Read:
        """As `Rows.read`."""
        pyarrow = import_optional("pyarrow", EXTRA)
        rows, damaged = self._values(part)
        for row, values in enumerate(rows):
            if text is not None and not isinstance(values.get(text), (str, type(None))):
                kind = type(values[text]).__name__
                damaged[row] = f"row {part.first_row + row}: {text} is {kind}, not a string."
                rows[row] = {}
        columns = [
            _array(pyarrow, [row.get(field.name) for row in rows], field.type) for field in schema
        ]
        return Read(pyarrow.Table.from_arrays(columns, schema=schema), damaged)

    def close(self) -> None:
        """As `Rows.close`."""
        self._file.close()

    def _values(self, part: Part) -> tuple[list[Mapping[str, Any]], dict[int, str]]:
        """Return a mapping of each row, empty for a damaged one, and what is wrong with those."""
        self._file.seek(part.first_byte)
        data = self._file.read(part.end_byte - part.first_byte)
        rows: list[Mapping[str, Any]] = []
        damaged: dict[int, str] = {}
        for row in self._split(data):
            try:
                rows.append(self._row(row))
            except (ValueError, RecursionError) as error:
                what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                damaged[len(rows)] = f"row {part.first_row + len(rows)} {what}."
                rows.append({})
        return rows, damaged

    def _header(self) -> Sequence[str]:
        """Return the names of the columns, and move `_begin` behind them."""
        return (TEXT,)

    def _row_ends(self) -> Iterator[int]:
        """Iterate over the position after each row, from `_begin`, where the file is."""
        position = self._begin
        for line in self._file:
            position += len(line)
            yield position

    def _split(self, data: bytes) -> Iterator[Any]:
        """Iterate over the rows of a part."""
        lines = data.split(b"\n")
        yield from lines if lines[-1] else lines[:-1]

    def _row(self, row: Any) -> Mapping[str, Any]:
        """Return the values of a row.

        Raises:
            ValueError: it is damaged. The message says what it is.
        """
        return {TEXT: row.removesuffix(b"\r").decode()}


class JsonLines(Lines):
    """JSON Lines: each line is an object, and its keys are columns."""

    def schema(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Schema:
        """As `Rows.schema`. Values of no common type are kept as JSON text."""
        pyarrow = import_optional("pyarrow", EXTRA)
        types = {name: pyarrow.null() for name in columns}
        for part in parts if columns else ():
            rows, _ = self._values(part)
            for name in columns:
                types[name] = _common(pyarrow, types[name], [row.get(name) for row in rows])
        string = pyarrow.string()
        return pyarrow.schema(
            [(name, string if pyarrow.types.is_null(t) else t) for name, t in types.items()]
        )

    def _header(self) -> Sequence[str]:
        names: dict[str, None] = {}
        for line, _ in zip(self._file, range(1000), strict=False):
            try:
                names |= dict.fromkeys(self._row(line))
            except ValueError:
                continue
        return list(names)

    def _row_ends(self) -> Iterator[int]:
        position = self._begin
        for line in self._file:
            position += len(line)
            if line.strip():
                yield position

    def _split(self, data: bytes) -> Iterator[bytes]:
        return filter(bytes.strip, data.split(b"\n"))

    def _row(self, row: bytes) -> Mapping[str, Any]:
        try:
            value = json.loads(row)
        except UnicodeDecodeError:
            raise
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError("is not a JSON object")
        if b"\\ud" in row.lower():  # perhaps half of a character, which no UTF-8 has
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("has half of a surrogate pair") from None
        return value


class Csv(Lines):
    """CSV with a header as RFC 4180 has it. A line break between quotes does not end a row."""

    delimiter = ","

    def _header(self) -> Sequence[str]:
        csv.field_size_limit(LONGEST_FIELD)
        position = next(self._row_ends(), self._begin)
        self._file.seek(self._begin)
        names = next(self._split(self._file.read(position - self._begin)), [])
        self._begin = position
        try:
            return [name.encode("latin-1").decode() for name in names]
        except UnicodeDecodeError:
            raise InvalidInput(f"the header of {self._name} is not UTF-8.") from None

    def _row_ends(self) -> Iterator[int]:
        position = self._begin

        def counted() -> Iterator[str]:
            nonlocal position
            for line in self._file:
                position += len(line)
                yield line.decode("latin-1")

        for row in self._parsed(counted()):
            if row:
                yield position

    def _split(self, data: bytes) -> Iterator[list[str]]:
        lines = (line.decode("latin-1") for line in io.BytesIO(data))
        return filter(None, self._parsed(lines))

    def _row(self, row: list[str]) -> Mapping[str, Any]:
        if len(row) != len(self.columns):
            raise ValueError(f"has {len(row)} fields; the header has {len(self.columns)}")
        values = (field.encode("latin-1").decode() for field in row)
        return dict(zip(self.columns, values, strict=True))

    def _parsed(self, lines: Iterator[str]) -> Iterator[list[str]]:
        # Latin-1 has one character for each byte: positions stay, and UTF-8 is decoded later.
        try:
            yield from csv.reader(lines, delimiter=self.delimiter)
        except csv.Error as error:
            raise InvalidInput(f"{self._name} is not CSV: {error}.") from None


class Tsv(Csv):
    """CSV with tabs for commas."""

    delimiter = "\t"


class Parquet:
    """A Parquet file, read in batches."""

    def __init__(self, source: Place) -> None:
        pyarrow = import_optional("pyarrow", EXTRA)
        parquet = import_optional("pyarrow.parquet", EXTRA)
        self._name = source.url
        self._file = source.files.open(source.path, "rb")
        try:
            # A buffer: a column of a row group is read in pieces, not as a whole.
            self._parquet = parquet.ParquetFile(self._file, buffer_size=1 << 20, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            self._file.close()
            raise InvalidInput(f"{self._name} is not Parquet ({type(error).__name__}).") from None
        self.columns: Sequence[str] = self._parquet.schema_arrow.names
        self._next_row = 0
        self._tables: Iterator[pa.Table] = iter(())
        self._rest: pa.Table | None = None

    def parts(self, max_rows: int, max_bytes: int) -> Iterator[Part]:
        """As `Rows.parts`."""
        metadata = self._parquet.metadata
        if not metadata.num_rows:
            return
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        row_bytes = sum(group.total_byte_size for group in groups) / metadata.num_rows
        rows = max(1, min(max_rows, int(max_bytes / (row_bytes or TEXT_BYTES_UNKNOWN))))
        for first_row in range(0, metadata.num_rows, rows):
            yield Part(first_row, min(rows, metadata.num_rows - first_row))

    def schema(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Schema:
        """As `Rows.schema`."""
        pyarrow = import_optional("pyarrow", EXTRA)
        return pyarrow.schema([self._parquet.schema_arrow.field(name) for name in columns])

    def content(self, name: str, *, is_image: bool) -> pa.Field:
        """As `Rows.content`: strings for texts; bytes, strings or a struct with them for images."""
        pyarrow = import_optional("pyarrow", EXTRA)
        field = self._parquet.schema_arrow.field(name)
        types = pyarrow.types
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        strings = (types.is_string, types.is_large_string, types.is_string_view)
        if any(is_kind(kind) for is_kind in strings):
            return pyarrow.field(name, pyarrow.string())
        binaries = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_struct)
        if is_image and any(is_kind(kind) for is_kind in binaries):
            return field.remove_metadata()
        raise InvalidInput(
            f"column {name!r} of {self._name} is {field.type}; give a column of "
            f"{'images: bytes, paths or URLs' if is_image else 'strings'}."
        )

    def read(self, part: Part, schema: pa.Schema, text: str | None = None) -> Read:
        """As `Rows.read`."""
        pyarrow = import_optional("pyarrow", EXTRA)
        try:
            if part.first_row != self._next_row or self._rest is None:
                self._go_to(part, schema)
            pieces, missing = [], part.rows
            while missing and self._rest is not None:
                piece = self._rest.slice(0, missing)
                pieces.append(piece)
                missing -= len(piece)
                rest = self._rest.slice(len(piece))
                self._rest = rest if len(rest) else next(self._tables, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise InvalidInput(f"{self._name} is damaged ({type(error).__name__}).") from None
        self._next_row = part.first_row + part.rows
        table = pyarrow.concat_tables(pieces).replace_schema_metadata(None)
        for place, field in enumerate(schema):
            if field.name not in self.columns:
                table = table.add_column(place, field, pyarrow.nulls(len(table), field.type))
        return Read(table.select(schema.names).cast(schema), {})

    def close(self) -> None:
        """As `Rows.close`."""
        self._parquet.close()
        self._file.close()

    def _go_to(self, part: Part, schema: pa.Schema) -> None:
        """Begin to read at the first row of a part."""
        metadata = self._parquet.metadata
        first = skipped = 0
        while skipped + metadata.row_group(first).num_rows <= part.first_row:
            skipped += metadata.row_group(first).num_rows
            first += 1
        self._tables = self._batches(range(first, metadata.num_row_groups), part.rows, schema)
        self._rest = next(self._tables, None)
        skip = part.first_row - skipped
        while skip and self._rest is not None:
            taken = min(skip, len(self._rest))
            skip -= taken
            rest = self._rest.slice(taken)
            self._rest = rest if len(rest) else next(self._tables, None)

    def _batches(self, groups: Sequence[int], rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
        pyarrow = import_optional("pyarrow", EXTRA)
        names = [name for name in schema.names if name in self.columns]
        batches = self._parquet.iter_batches(
            batch_size=rows, row_groups=list(groups), columns=names, use_threads=False
        )
        for batch in batches:
            yield pyarrow.Table.from_batches([batch])


FORMATS: Mapping[str, type[Lines] | type[Parquet]] = {
    ".parquet": Parquet,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": Csv,
    ".tsv": Tsv,
    ".txt": Lines,
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*FORMATS, *(f + c for f in FORMATS if f != ".parquet" for c in COMPRESSED))


def open_rows(source: Place) -> Rows:
    """Open a source; the end of its name tells the format.

    Raises:
        InvalidInput: the name has another end, or the file is damaged.
    """
    name = source.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    for suffix, kind in FORMATS.items():
        if name.endswith(suffix):
            return kind(source)
    raise InvalidInput(
        f"SOURCE {source.url} does not end with {', '.join(FORMATS)}, perhaps with "
        f"{', '.join(COMPRESSED)} after it."
    )


def _common(pyarrow: Any, known: pa.DataType, values: list[Any]) -> pa.DataType:
    """Return the type of values of which those before have the type `known`."""
    if known == pyarrow.string() and any(not isinstance(v, (str, type(None))) for v in values):
        return known
    try:
        fields = [pyarrow.schema([("", t)]) for t in (known, pyarrow.array(values).type)]
        return pyarrow.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.string()


def _array(pyarrow: Any, values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return values as an array of a type; what is no string becomes JSON where that is asked."""
    if kind == pyarrow.string():
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in values
        ]
    return pyarrow.array(values, kind)
