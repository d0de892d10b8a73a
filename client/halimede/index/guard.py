"""The guard: no vector enters or queries a collection of another space."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halimede.embedder import BaseClient, Embedder
from halimede.index.record import SpaceRecord
from halimede.index.stores import address
from halimede.index.stores.base import PACKED, Match, Page, Store
from halimede.index.verify import verify
from halimede.pipeline.waiting import drive
from halimede.results import Embeddings
from halimede_ops.errors import InvalidInput, SpaceRefused

RECORD_AGE_S = 1.0
"""A query trusts a record that was read so long ago. A write reads it again."""
ADOPT = (
    "If you know which model made its vectors, record it: `halimede index adopt`, or "
    "`guard.adopt(…)`."
)


class Guard:
    """A collection that takes and answers vectors of its own space alone.

    The first write into an empty collection records space, precision, dims and output type in the
    collection's metadata. Later, vectors of another record are refused.
    """

    def __init__(self, store: Store, precisions: Sequence[str] = ()) -> None:
        self.store = store
        """The collection as `halimede.index` sees it."""
        self._precisions = tuple(precisions)
        self._record: SpaceRecord | None = None
        self._read_at_s = -RECORD_AGE_S

    @property
    def record(self) -> SpaceRecord | None:
        """The collection's record, read now. None: there is none."""
        self._record, self._read_at_s = self.store.read(), time.monotonic()
        return self._record

    def check(self, by: Embeddings | BaseClient) -> None:
        """Check that the vectors of a result, or of an embedder, belong to the collection.

        Of an embedder, space and precision are compared: each of its calls has dims and an output
        type of its own. An empty collection without a record takes any.

        Raises:
            SpaceRefused: they have another space, precision, number of dims or output type; or
                the collection has vectors and no record.
        """
        record = self._known()
        if record is None:
            self._check_empty()
        elif isinstance(by, BaseClient):
            model = drive(by._pipeline.describe())
            facts = (model.space, model.precision, record.dims, record.output_type, model.name)
            record.check(SpaceRecord(*facts), self.store.name, "the embedder", self._precisions)
        else:
            other = SpaceRecord.of(by)
            record.check(other, self.store.name, "the result", self._precisions)

    def checked(self, result: Embeddings) -> np.ndarray:
        """Return the vectors of a result after `check`, for the store's own client.

        Raises:
            SpaceRefused: as `check`.
        """
        self.check(result)
        return result.vectors

    def write(
        self,
        ids: Sequence[Any],
        result: Embeddings,
        *,
        texts: Sequence[str | None] | None = None,
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write the vectors of a result. A row whose id is there is replaced as a whole.

        Args:
            ids: for each row an id, of a type that the store takes.
            result: its vectors are written. If inputs failed (`errors="collect"`), it has fewer
                rows than inputs: `result.indices` says which.
            texts: for each row its text.
            fields: for each row what else is kept: Qdrant's payload, Chroma's metadata, columns
                of LanceDB and PostgreSQL.

        Raises:
            SpaceRefused: as `check`, or another writer has recorded another space meanwhile.
            InvalidInput: the arguments differ in length, or the store cannot keep such vectors.
        """
        given = SpaceRecord.of(result)
        page = Page(ids, texts, fields, result.vectors)
        if not self.store.keeps_texts and (texts is not None or fields is not None):
            raise InvalidInput(f"{self.store.name} keeps vectors alone; give no texts or fields.")
        self.store.refresh()
        self._check_form(given, result.vectors.shape[1])
        record = self.record
        if record is None:
            record = self._claim(given)
        record.check(given, self.store.name, "the result", self._precisions)
        if len(page):
            self.store.write(page)

    def query(self, result: Embeddings, k: int = 10) -> list[list[Match]]:
        """Return the `k` best rows for each vector of a result, the best first.

        Raises:
            SpaceRefused: as `check`.
        """
        vectors = self.checked(result)
        return self.store.query(vectors, k) if len(vectors) else []

    def adopt(
        self, by: Embeddings | Embedder | SpaceRecord, *, replace: bool = False, **options: Any
    ) -> SpaceRecord:
        """Record which space the vectors have that a collection has already, and return the record.

        An embedder embeds some of the collection's own texts: the record is written only if its
        vectors are those of the collection. A result or a record is believed.

        Args:
            by: an `Embedder`, a result, or a record.
            replace: write over another record.
            options: `input_type` and `dimensions` with which the embedder made the vectors.

        Raises:
            SpaceRefused: the vectors are not the embedder's, or have another length, or there is
                another record.
        """
        if isinstance(by, Embedder):
            record = verify(self.store, by, **options)
        else:
            record = by if isinstance(by, SpaceRecord) else SpaceRecord.of(by)
        self.store.refresh()
        packed = record.output_type in PACKED
        self._check_form(record, -(-record.dims // 8) if packed else record.dims)
        if replace:
            self.store.replace(record)
        else:
            there = self.store.claim(record)
            there.check(record, self.store.name, "the record to adopt")
        self._read_at_s = -RECORD_AGE_S
        return record

    def _known(self) -> SpaceRecord | None:
        is_recent = time.monotonic() - self._read_at_s < RECORD_AGE_S
        return self._record if is_recent and self._record is not None else self.record

    def _claim(self, given: SpaceRecord) -> SpaceRecord:
        """Record the space of the first vectors."""
        if self.store.count():
            # A writer that was faster recorded before it wrote.
            record = self.record
            if record is not None:
                return record
            self._check_empty()
        self._read_at_s = -RECORD_AGE_S
        return self.store.claim(given)

    def _check_empty(self) -> None:
        if self.store.count() and self.store.read() is None:
            raise SpaceRefused(
                f"{self.store.name} has vectors and no record of their space. {ADOPT}"
            )

    def _check_form(self, given: SpaceRecord, width: int) -> None:
        name = self.store.name
        if given.output_type in PACKED and given.output_type not in self.store.packed:
            raise InvalidInput(
                f"{name} does not take {given.output_type}; give another output type."
            )
        expected = self.store.width()
        if expected is not None and expected != width:
            raise SpaceRefused(
                f"{name} has vectors of {expected} values; {given.model or 'the record'} has "
                f"{width} ({given.dims} dims, {given.output_type})."
            )


def guard(
    collection: Any,
    name: str | None = None,
    *,
    embedder: BaseClient | Embeddings | None = None,
    precisions: Sequence[str] = (),
    id_field: str | None = None,
    text_field: str | None = None,
    vector_field: str | None = None,
) -> Guard:
    """Return a guard of a collection: vectors of another space are refused.

    ```python
    docs = halimede.guard(qdrant_client, "docs")
    docs.write([1, 2], embedder.embed(texts), texts=texts)
    docs.query(embedder.embed("a question"), k=5)
    ```

    Args:
        collection: a `QdrantClient` or a psycopg connection with the name of a collection or a
            table, a collection of Chroma, a table of LanceDB, the path of a FAISS index, or an
            address as `halimede index` takes it.
        name: collection or table.
        embedder: what will write and query: it is checked now, as `Guard.check` does.
        precisions: precisions of the same space to accept beside the recorded one.
        id_field: column of the ids in LanceDB and PostgreSQL. Default: `id`.
        text_field: column or payload key of the texts. Default: `text`.
        vector_field: column or name of the vectors. Default: the only one there is.

    Raises:
        InvalidInput: it is no such collection.
        SpaceRefused: the embedder has another space than the collection.
    """
    given = {"id_field": id_field, "text_field": text_field, "vector_field": vector_field}
    options = {key: value for key, value in given.items() if value is not None}
    result = Guard(address.recognise(collection, name, options), precisions)
    if embedder is not None:
        result.check(embedder)
    return result
