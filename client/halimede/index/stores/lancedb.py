"""LanceDB: the record is a key of the vector column's metadata.

Lance commits a change of metadata against the version of the table that was read, and refuses it if
another writer changed the same metadata since: a compare-and-set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halimede.extras import import_optional
from halimede.index.record import KEY, SpaceRecord
from halimede.index.stores.base import PACKED, Match, Page, existing_folder
from halimede_ops.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

EXTRA = "index-lancedb"
OPTIONS = ("id_field", "text_field", "vector_field")
DISTANCE = "_distance"
PLACES = 8
"""Places of the table from which a sample is drawn."""


class LanceDB:
    """A table of LanceDB."""

    keeps_texts = True

    def __init__(
        self,
        table: Any,
        *,
        id_field: str = "id",
        text_field: str = "text",
        vector_field: str | None = None,
    ) -> None:
        self._table = table
        self._id = id_field
        self._text = text_field
        self._vector = _vector_column(table, vector_field)
        if id_field not in table.schema.names:
            raise InvalidInput(
                f"{self.name} has no column {id_field!r}; give id_field as one of "
                f"{', '.join(map(repr, table.schema.names))}."
            )

    @property
    def name(self) -> str:
        """As `Store.name`."""
        return f"the LanceDB table {self._table.name!r}"

    @property
    def fields_type(self) -> Any:
        """As `Store.fields_type`: JSON has not all types of Lance."""
        pyarrow = import_optional("pyarrow", EXTRA)
        own = (self._id, self._text, self._vector)
        others = [field for field in self._table.schema if field.name not in own]
        return pyarrow.struct(others) if others else None

    @property
    def packed(self) -> Sequence[str]:
        """As `Store.packed`: a column of bytes takes them."""
        kind = str(self._table.schema.field(self._vector).type.value_type)
        return {"int8": ("binary",), "uint8": ("ubinary",)}.get(kind, ())

    def refresh(self) -> None:
        """As `Store.refresh`: the table is opened at its last version."""
        self._table.checkout_latest()

    def read(self) -> SpaceRecord | None:
        """As `Store.read`, of the version of the table that is open."""
        metadata = self._table.schema.field(self._vector).metadata or {}
        text = metadata.get(KEY.encode())
        return None if text is None else SpaceRecord.from_json(text.decode(), self.name)

    def claim(self, record: SpaceRecord) -> SpaceRecord:
        """As `Store.claim`."""
        there = self.read()
        if there is not None:
            return there
        try:
            self.replace(record)
        except (RuntimeError, OSError):  # another writer was faster
            self._table.checkout_latest()
            there = self.read()
            if there is None:
                raise
            return there
        return record

    def replace(self, record: SpaceRecord) -> None:
        """As `Store.replace`."""
        update = {"path": self._vector, "metadata": {KEY: record.to_json()}}
        self._table.update_field_metadata(update)

    def count(self) -> int:
        """As `Store.count`."""
        return int(self._table.count_rows())

    def width(self) -> int | None:
        """As `Store.width`."""
        kind = self._table.schema.field(self._vector).type
        return int(getattr(kind, "list_size", -1)) if _has_size(kind) else None

    def write(self, page: Page) -> None:
        """As `Store.write`. Columns that a row does not give are null."""
        merge = self._table.merge_insert(self._id)
        merge.when_matched_update_all().when_not_matched_insert_all().execute(self._arrow(page))

    def query(self, vectors: np.ndarray, k: int) -> list[list[Match]]:
        """As `Store.query`: `score` is the distance."""
        return [self._matches(vector, k) for vector in vectors]

    def pages(self, size: int) -> Iterator[Page]:
        """As `Store.pages`."""
        names = [name for name in self._table.schema.names if name != self._vector]
        rows = self._table.search().select(names).limit(self.count())
        for batch in rows.to_batches(size):
            if batch.num_rows:
                yield self._page(batch.to_pylist())

    def sample(self, count: int) -> Page:
        """As `Store.sample`: from up to eight places of the table."""
        rows = self.count()
        starts = np.linspace(0, max(0, rows - count // PLACES), PLACES).astype(int)
        places = np.unique((starts[:, None] + np.arange(max(1, count // PLACES))).ravel())
        if rows <= count:
            places = np.arange(rows)
        found = self._table.take_offsets(places[places < rows].tolist()).to_list() if rows else []
        vectors = [row.pop(self._vector) for row in found]
        page = self._page(found)
        return Page(page.ids, page.texts, page.fields, np.array(vectors, np.float32))

    @contextlib.contextmanager
    def created(self, name: str, record: SpaceRecord) -> Iterator[LanceDB]:
        """As `Store.created`: the other columns are those of this table. It has no index."""
        pyarrow = import_optional("pyarrow", EXTRA)
        database = import_optional("lancedb", EXTRA).connect(
            str(self._table.uri).rstrip("/").rpartition("/")[0],
            storage_options=self._table.initial_storage_options(),
        )
        try:
            table = database.open_table(name)
        except (ValueError, FileNotFoundError):
            fields = []
            for field in self._table.schema:
                if field.name == self._vector:
                    width = -(-record.dims // 8) if record.output_type in PACKED else record.dims
                    kind = pyarrow.list_(field.type.value_type, width)
                    metadata = {**(field.metadata or {}), KEY: record.to_json()}
                    fields.append(pyarrow.field(field.name, kind, field.nullable, metadata))
                else:
                    fields.append(field)
            schema = pyarrow.schema(fields, metadata=self._table.schema.metadata)
            table = database.create_table(name, schema=schema)
        new = LanceDB(table, id_field=self._id, text_field=self._text, vector_field=self._vector)
        new.claim(record).check(record, new.name, "the new vectors")
        yield new

    def close(self) -> None:
        """As `Store.close`: nothing is open."""

    def _arrow(self, page: Page) -> pa.Table:
        """Return rows as the table has them.

        Raises:
            InvalidInput: a value has another type than its column, or there is no such column.
        """
        pyarrow = import_optional("pyarrow", EXTRA)
        schema = self._table.schema
        names = {name for row in range(len(page)) for name in page.field(row)}
        if page.texts is not None:
            names.add(self._text)
        unknown = sorted(names - set(schema.names))
        if unknown:
            raise InvalidInput(
                f"{self.name} has no column {unknown[0]!r}; it has "
                f"{', '.join(map(repr, schema.names))}."
            )
        columns = []
        for field in schema:
            if field.name == self._vector:
                vectors = np.ascontiguousarray(page.vectors)
                values = pyarrow.array(vectors.reshape(-1)).cast(field.type.value_type)
                made = pyarrow.FixedSizeListArray.from_arrays(values, vectors.shape[1])
                columns.append(made if _has_size(field.type) else made.cast(field.type))
                continue
            values = [self._value(page, row, field.name) for row in range(len(page))]
            try:
                columns.append(pyarrow.array(values, field.type))
            except (pyarrow.ArrowException, TypeError):
                raise InvalidInput(
                    f"column {field.name!r} of {self.name} takes {field.type}; a value is none."
                ) from None
        return pyarrow.Table.from_arrays(columns, schema=schema)

    def _value(self, page: Page, row: int, column: str) -> Any:
        if column == self._id:
            return _id(page.ids[row], self._table.schema.field(column).type)
        if column == self._text and page.texts is not None:
            return page.text(row)
        return page.field(row).get(column)

    def _matches(self, vector: np.ndarray, k: int) -> list[Match]:
        names = [name for name in self._table.schema.names if name != self._vector]
        found = self._table.search(vector, vector_column_name=self._vector).limit(k)
        if vector.dtype == np.uint8:  # Lance compares bytes by their bits alone
            found = found.distance_type("hamming")
        rows = found.select([*names, DISTANCE]).to_list()
        scores = [row.pop(DISTANCE) for row in rows]
        page = self._page(rows)
        return [
            Match(page.ids[row], float(score), page.text(row), page.field(row))
            for row, score in enumerate(scores)
        ]

    def _page(self, rows: list[dict[str, Any]]) -> Page:
        ids = [row.pop(self._id) for row in rows]
        return Page(ids, [row.pop(self._text, None) for row in rows], rows)


def of(table: Any, name: str | None, **options: str) -> LanceDB:
    """Return a table, or the one of this name of a connection.

    Raises:
        InvalidInput: it is neither, or is for asyncio.
    """
    if name is not None and hasattr(table, "open_table"):
        table = table.open_table(name)
    if type(table).__name__.startswith("Async") or not hasattr(table, "merge_insert"):
        raise InvalidInput(
            f"{type(table).__name__} is no table of LanceDB; give "
            'lancedb.connect("data").open_table("articles").'
        )
    return LanceDB(table, **options)


def connect(place: str, name: str, **options: str) -> LanceDB:
    """Return a table in a folder, or in an object store."""
    package = import_optional("lancedb", EXTRA)
    address = place if "://" in place else existing_folder(place, "LanceDB")
    try:
        return LanceDB(package.connect(address).open_table(name), **options)
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"LanceDB has no table {name!r} at {place}.") from None


def _has_size(kind: Any) -> bool:
    return int(getattr(kind, "list_size", -1)) > 0


def _vector_column(table: Any, asked: str | None) -> str:
    """Return the column asked for, or the only one that has lists of one length.

    Raises:
        InvalidInput: there is none, or there are several.
    """
    names = [field.name for field in table.schema if _has_size(field.type)]
    if asked is not None and asked in table.schema.names:
        return asked
    if asked is None and len(names) == 1:
        return str(names[0])
    raise InvalidInput(
        f"the LanceDB table {table.name!r} has {len(names)} vector columns"
        f"{' and none is ' + repr(asked) if asked else ''}; give vector_field as one of "
        f"{', '.join(map(repr, names)) or 'its columns'}."
    )


def _id(value: Any, kind: Any) -> Any:
    """Return an id as its column has it: an exported one is text."""
    pyarrow = import_optional("pyarrow", EXTRA)
    return int(value) if isinstance(value, str) and pyarrow.types.is_integer(kind) else value
