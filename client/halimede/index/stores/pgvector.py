"""PostgreSQL with pgvector: the record is a line of the comment on the vector column.

A comment belongs to the column: it is dropped and renamed with it, pg_dump keeps it, and every role
can read it. A table of records would need rights of its own, and a table that takes the name of
another would inherit its record. Only the table's owner can write a comment: the owner makes the
first write, or `halimede index adopt`.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.index.record import KEY, SpaceRecord
from halimede.index.stores.base import Match, Page
from halimede_ops.errors import InvalidInput

EXTRA = "index-pgvector"
OPTIONS = ("id_field", "text_field", "vector_field")
LINE = re.compile(rf"^{KEY}: (\{{.*\}})$", re.MULTILINE)
"""The record's line of a comment."""
COLUMNS = """
SELECT attname, format_type(atttypid, NULL), atttypmod, attgenerated <> ''
FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
COMMENT = """
SELECT col_description(attrelid, attnum) FROM pg_attribute
WHERE attrelid = %s::regclass AND attname = %s
"""
IS_UNIQUE = """
SELECT EXISTS (
    SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
    WHERE indrelid = %s::regclass AND indisunique AND indnkeyatts = 1 AND indpred IS NULL
    AND attname = %s
)
"""
INDEX_CLASS = """
SELECT opcname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
JOIN pg_opclass ON pg_opclass.oid = indclass[0]
WHERE indrelid = %s::regclass AND attname = %s AND opcname ~ '^(vector|halfvec|bit)_' LIMIT 1
"""
TYPES = ("vector", "halfvec", "bit")
OPERATORS = {"cosine": "<=>", "l2": "<->", "ip": "<#>", "l1": "<+>", "hamming": "<~>"}
"""Part of an index's operator class → operator of its distance."""
SAMPLED = 20
"""A sample is drawn from so many times its rows, in the order of the table's blocks."""


class PgVector:
    """A vector column of a table."""

    keeps_texts = True
    fields_type = None

    def __init__(
        self,
        connection: Any,
        table: str,
        *,
        id_field: str = "id",
        text_field: str = "text",
        vector_field: str | None = None,
    ) -> None:
        self._close: Callable[[], None] = lambda: None
        self._connection = connection
        self._sql = import_optional("psycopg.sql", EXTRA)
        self._rows = import_optional("psycopg.rows", EXTRA)
        self._table = table
        self._identifier = self._sql.Identifier(*table.split("."))
        self._regclass = self._identifier.as_string(connection)
        self._id, self._text = id_field, text_field
        self._types = self._read_types()
        self._vector = self._vector_column(vector_field)
        self._kind = self._types[self._vector][0].rpartition(".")[2]
        if id_field not in self._types:
            raise InvalidInput(
                f"{self.name} has no column {id_field!r}; give id_field as one of "
                f"{', '.join(map(repr, self._types))}."
            )
        self._is_unique = bool(self._fetch(IS_UNIQUE, self._regclass, id_field)[0][0])

    @property
    def name(self) -> str:
        """As `Store.name`."""
        return f"the PostgreSQL table {self._table!r}"

    @property
    def packed(self) -> Sequence[str]:
        """As `Store.packed`."""
        return ("ubinary",) if self._kind == "bit" else ()

    def refresh(self) -> None:
        """As `Store.refresh`: it always does."""

    def read(self) -> SpaceRecord | None:
        """As `Store.read`."""
        found = LINE.search(self._comment())
        return None if found is None else SpaceRecord.from_json(found[1], self.name)

    def claim(self, record: SpaceRecord) -> SpaceRecord:
        """As `Store.claim`: the table is locked against other comments meanwhile.

        Raises:
            InvalidInput: the connection is in a transaction that cannot see other writers.
        """
        with self._connection.transaction():
            there = self.read()
            if there is not None:
                return there
            self._lock()
            there = self.read()
            if there is None:
                self._write_comment(record)
            return there or record

    def replace(self, record: SpaceRecord) -> None:
        """As `Store.replace`."""
        with self._connection.transaction():
            self._lock()
            self._write_comment(record)

    def count(self) -> int:
        """As `Store.count`."""
        query = self._format("SELECT count(*) FROM {table}")
        return int(self._fetch(query)[0][0])

    def width(self) -> int | None:
        """As `Store.width`. Of a column of bits in bytes."""
        size = self._types[self._vector][1]
        if size <= 0:
            return None
        return -(-size // 8) if self._kind == "bit" else size

    def write(self, page: Page) -> None:
        """As `Store.write`. Without a unique index on the id, rows are added."""
        if not len(page):
            return
        names = [name for row in range(len(page)) for name in page.field(row)]
        if page.texts is not None:
            names.append(self._text)
        columns = list(dict.fromkeys((self._id, self._vector, *names)))
        unknown = [name for name in columns if name not in self._types]
        if unknown:
            raise InvalidInput(
                f"{self.name} has no column {unknown[0]!r}; it has "
                f"{', '.join(map(repr, self._types))}."
            )
        columns = [name for name in columns if not self._types[name][2]]
        rows = [self._row(page, row) for row in range(len(page))]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(self._insert(columns), rows)

    def query(self, vectors: np.ndarray, k: int) -> list[list[Match]]:
        """As `Store.query`: `score` is the distance of the column's index, else the cosine's."""
        others = [name for name in self._types if name != self._vector]
        query = self._format(
            "SELECT {names}, {vector} {operator} %s::{kind} FROM {table} "
            "ORDER BY {vector} {operator} %s::{kind} LIMIT %s",
            names=self._sql.SQL(", ").join(map(self._sql.Identifier, others)),
            operator=self._sql.SQL(self._operator()),
            kind=self._sql.SQL(self._kind_of(self._types[self._vector][1])),
        )
        answers = []
        with self._connection.transaction():
            for text in map(self._literal, vectors):
                rows = self._fetch(query, text, text, k)
                answers.append([self._match(others, row) for row in rows])
        return answers

    def pages(self, size: int) -> Iterator[Page]:
        """As `Store.pages`: one query, of one state of the table."""
        query = self._format(
            "SELECT {id}::text, {text}, {fields} FROM {table} AS t", **self._columns()
        )
        with self._connection.transaction():
            with self._connection.cursor(KEY, row_factory=self._rows.tuple_row) as cursor:
                cursor.execute(query)
                while rows := cursor.fetchmany(size):
                    yield self._page(rows)

    def sample(self, count: int) -> Page:
        """As `Store.sample`: of rows of all blocks of the table."""
        share = min(100.0, 100.0 * SAMPLED * count / max(1, self.count()))
        query = self._format(
            "SELECT {id}::text, {text}, {fields}, {vector}::text FROM {table} AS t "
            "TABLESAMPLE BERNOULLI (%s) LIMIT %s",
            **self._columns(),
        )
        rows = self._fetch(query, share, count)
        page = self._page([row[:3] for row in rows])
        vectors = [self._values(row[3]) for row in rows]
        return Page(page.ids, page.texts, page.fields, np.array(vectors, np.float32))

    @contextlib.contextmanager
    def created(self, name: str, record: SpaceRecord) -> Iterator[PgVector]:
        """As `Store.created`: `CREATE TABLE … (LIKE … INCLUDING ALL)`, with all rows or none.

        Foreign keys, triggers and grants are not copied. A sequence that belongs to this table's id
        is still used by the new one, unless it is of an identity column.
        """
        options = {
            "id_field": self._id,
            "text_field": self._text,
            "vector_field": self._vector,
        }
        new_table = self._sql.Identifier(*name.split("."))
        with self._connection.transaction():
            is_there = self._fetch("SELECT to_regclass(%s)", new_table.as_string(self._connection))
            if is_there[0][0] is None:
                kind = self._sql.SQL(self._kind_of(record.dims))
                for statement in (
                    "CREATE TABLE {new} (LIKE {table} INCLUDING ALL)",
                    "ALTER TABLE {new} ALTER COLUMN {vector} TYPE {kind}",
                ):
                    self._execute(self._format(statement, new=new_table, kind=kind))
                new = PgVector(self._connection, name, **options)
                new.replace(record)  # the comment that was copied has the record of this table
            new = PgVector(self._connection, name, **options)
            new.claim(record).check(record, new.name, "the new vectors")
            yield new
            new._restart_sequence()

    def close(self) -> None:
        """As `Store.close`."""
        self._close()

    def _read_types(self) -> dict[str, tuple[str, int, bool]]:
        """Return each column: its type, the length it is given, and whether it is computed."""
        psycopg = import_optional("psycopg", EXTRA)
        try:
            rows = self._fetch(COLUMNS, self._regclass)
        except psycopg.errors.UndefinedTable:
            raise InvalidInput(
                f"PostgreSQL has no table {self._table!r}. Create it first."
            ) from None
        return {name: (kind, size, computed) for name, kind, size, computed in rows}

    def _vector_column(self, asked: str | None) -> str:
        """Return the column asked for, or the only one with vectors.

        Raises:
            InvalidInput: there is none, or there are several.
        """
        kinds = {name: kind.rpartition(".")[2] for name, (kind, *_) in self._types.items()}
        names = [name for name, kind in kinds.items() if kind in TYPES]
        if asked in names:
            return str(asked)
        if asked is None and len(names) == 1:
            return names[0]
        raise InvalidInput(
            f"the table {self._table!r} has {len(names)} columns of vectors"
            f"{' and none is ' + repr(asked) if asked else ''}; give vector_field as one of "
            f"{', '.join(map(repr, names)) or 'its columns'}."
        )

    def _comment(self) -> str:
        return str(self._fetch(COMMENT, self._regclass, self._vector)[0][0] or "")

    def _lock(self) -> None:
        """Lock the table against other comments until the end of the transaction.

        Raises:
            InvalidInput: the transaction would not see what others wrote before.
        """
        level = self._fetch("SELECT current_setting('transaction_isolation')")[0][0]
        if level != "read committed":
            raise InvalidInput(
                f"the connection is in a transaction of level {level}, which does not see other "
                "writers. Record the space first, at the level READ COMMITTED."
            )
        with self._owners_only():
            self._execute(self._format("LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE"))

    def _write_comment(self, record: SpaceRecord) -> None:
        own = LINE.sub("", self._comment()).strip("\n")
        text = "\n".join(filter(None, (own, f"{KEY}: {record.to_json()}")))
        with self._owners_only():
            self._execute(
                self._format(
                    "COMMENT ON COLUMN {table}.{vector} IS {comment}",
                    comment=self._sql.Literal(text),
                )
            )

    @contextlib.contextmanager
    def _owners_only(self) -> Iterator[None]:
        psycopg = import_optional("psycopg", EXTRA)
        try:
            yield
        except psycopg.errors.InsufficientPrivilege:
            raise InvalidInput(
                f"only the owner of {self.name} can record its space: let the owner make the first "
                "write, or run `halimede index adopt`."
            ) from None

    def _insert(self, columns: Sequence[str]) -> Any:
        """Return the statement that writes a row of JSON."""
        names = self._sql.SQL(", ").join(map(self._sql.Identifier, columns))
        statement = (
            "INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE "
            "SELECT {names} FROM jsonb_populate_record(NULL::{table}, %s::jsonb || %s::jsonb)"
        )
        changed = self._sql.SQL(", ").join(
            self._sql.SQL("{0} = EXCLUDED.{0}").format(self._sql.Identifier(name))
            for name in columns
            if name != self._id
        )
        if self._is_unique:
            statement += " ON CONFLICT ({id}) DO UPDATE SET {changed}"
        return self._format(statement, names=names, changed=changed)

    def _row(self, page: Page, row: int) -> tuple[str, str]:
        """Return a row as two JSON objects: its fields, and what the guard knows of it."""
        fields = {} if page.fields is None else page.fields[row]
        known: dict[str, Any] = {} if page.texts is None else {self._text: page.text(row)}
        known[self._id] = page.ids[row]
        if page.vectors is not None:
            known[self._vector] = self._literal(page.vectors[row])
        given = fields if isinstance(fields, str) else json.dumps(fields, default=_as_text)
        return given, json.dumps(known, default=_as_text)

    def _literal(self, vector: np.ndarray) -> str:
        """Return a vector as PostgreSQL reads it."""
        if self._kind == "bit":
            size = self._types[self._vector][1]
            bits = np.unpackbits(vector.view(np.uint8))[: size if size > 0 else None]
            return "".join(map(str, bits.tolist()))
        return f"[{','.join(map(str, np.asarray(vector, np.float32).tolist()))}]"

    def _values(self, text: str) -> np.ndarray:
        """Return a vector that PostgreSQL printed; bits as −1 and 1."""
        if self._kind == "bit":
            return np.array([1.0 if bit == "1" else -1.0 for bit in text], np.float32)
        return np.array(text.strip("[]").split(","), np.float32)

    def _operator(self) -> str:
        found = self._fetch(INDEX_CLASS, self._regclass, self._vector)
        distance = found[0][0].split("_")[1] if found else ""
        return OPERATORS.get(distance, "<~>" if self._kind == "bit" else "<=>")

    def _kind_of(self, dims: int) -> str:
        return f"{self._kind}({dims})" if dims > 0 else self._kind

    def _match(self, names: Sequence[str], row: Sequence[Any]) -> Match:
        fields = dict(zip(names, row, strict=False))
        return Match(fields.pop(self._id), float(row[-1]), fields.pop(self._text, None), fields)

    def _page(self, rows: Sequence[tuple[Any, ...]]) -> Page:
        ids, texts, fields = zip(*rows, strict=True) if rows else ((), (), ())
        return Page(ids, texts, fields)

    def _restart_sequence(self) -> None:
        """Let an identity column go on after the ids that were written."""
        self._execute(
            self._format(
                "SELECT setval(pg_get_serial_sequence(%s, %s), max({id})) FROM {table} "
                "HAVING max({id}) IS NOT NULL"
            ),
            self._regclass,
            self._id,
        )

    def _format(self, statement: str, **parts: Any) -> Any:
        return self._sql.SQL(statement).format(
            table=self._identifier,
            id=self._sql.Identifier(self._id),
            vector=self._sql.Identifier(getattr(self, "_vector", "")),
            **parts,
        )

    def _columns(self) -> dict[str, Any]:
        """Return the text and the fields of a row: the fields are JSON of the other columns."""
        names = (self._id, self._text, self._vector)
        without = self._sql.SQL(" - ").join(map(self._sql.Literal, names))
        has_text = self._text in self._types
        return {
            "fields": self._sql.SQL("(to_jsonb(t) - {})::text").format(without),
            "text": self._sql.Identifier(self._text) if has_text else self._sql.NULL,
        }

    def _execute(self, statement: Any, *values: Any) -> None:
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(statement, values or None)

    def _fetch(self, query: Any, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query, in a transaction that ends with it if none is open."""
        with self._connection.transaction():
            with self._connection.cursor(row_factory=self._rows.tuple_row) as cursor:
                return list(cursor.execute(query, values or None).fetchall())


def of(connection: Any, name: str | None, **options: str) -> PgVector:
    """Return a table of an open connection.

    Raises:
        InvalidInput: the connection is for asyncio, or the name is missing.
    """
    if name is None:
        raise InvalidInput('give the table\'s name too: halimede.guard(connection, "articles").')
    if type(connection).__name__.startswith("Async") or not hasattr(connection, "transaction"):
        raise InvalidInput(
            f"{type(connection).__name__} is no blocking connection; open one with psycopg.connect."
        )
    return PgVector(connection, name, **options)


def connect(place: str, name: str, **options: str) -> PgVector:
    """Return a table of a database. The password is best in PGPASSWORD or ~/.pgpass."""
    psycopg = import_optional("psycopg", EXTRA)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(place, autocommit=True))
        store = PgVector(connection, name, **options)
        store._close = stack.pop_all().close
    return store


def _as_text(value: Any) -> Any:
    """Return a value that JSON does not have as the text that PostgreSQL reads it from.

    Raises:
        InvalidInput: there is none.
    """
    if isinstance(value, (bytes, bytearray)):
        return f"\\x{value.hex()}"
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise InvalidInput(f"a field is {type(value).__name__}, which has no text for PostgreSQL.")
