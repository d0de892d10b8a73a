"""Chroma: the record is a key of the collection's metadata.

Chroma replaces a collection's metadata as a whole, without compare-and-set. What it does atomically
is to create a collection. So a writer first creates a collection whose name has the id of this one,
a claim, and deletes it when the record is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.index.record import KEY, SpaceRecord
from halimede.index.stores.base import Match, Page, existing_folder
from halimede_ops.errors import InvalidInput, SpaceRefused

EXTRA = "index-chroma"
OPTIONS = ()
TOKEN = "CHROMA_TOKEN"  # noqa: S105  # the name of a variable
BATCH = 1000
"""Rows in one request; Chroma allows some thousands."""


class Chroma:
    """A collection of Chroma. Its documents are the texts."""

    keeps_texts = True
    packed = ()
    fields_type = None

    def __init__(self, collection: Any) -> None:
        self._owned: Any = None
        self._collection = collection
        # A collection knows the metadata that it had when it was opened, and can only replace them
        # without "hnsw:space". The client within it can read them now, and write them all.
        self._client = collection._client
        self._where = {"tenant": collection.tenant, "database": collection.database}

    @property
    def name(self) -> str:
        """As `Store.name`."""
        return f"the Chroma collection {self._collection.name!r}"

    def refresh(self) -> None:
        """As `Store.refresh`: it always does."""

    def read(self) -> SpaceRecord | None:
        """As `Store.read`."""
        text = self._metadata().get(KEY)
        return None if text is None else SpaceRecord.from_json(str(text), self.name)

    def claim(self, record: SpaceRecord) -> SpaceRecord:
        """As `Store.claim`."""
        claim = f"{KEY}-claim-{self._collection.id}"
        try:
            self._client.create_collection(claim, metadata={KEY: record.to_json()}, **self._where)
        except Exception as error:  # of another class in each kind of client
            self._check_same_claim(claim, record, error)
        try:
            there = self.read()
            if there is None:
                self._set(record)
                there = record
        finally:
            # One of two equal claims is deleted by the other writer.
            with contextlib.suppress(Exception):
                self._client.delete_collection(claim, **self._where)
        return there

    def replace(self, record: SpaceRecord) -> None:
        """As `Store.replace`. A claim that a killed writer left is deleted."""
        self._set(record)
        with contextlib.suppress(Exception):
            self._client.delete_collection(f"{KEY}-claim-{self._collection.id}", **self._where)

    def count(self) -> int:
        """As `Store.count`."""
        return int(self._collection.count())

    def width(self) -> int | None:
        """As `Store.width`: the first vectors fix it."""
        first = self._collection.get(limit=1, include=["embeddings"])["embeddings"]
        return len(first[0]) if len(first) else None

    def write(self, page: Page) -> None:
        """As `Store.write`."""
        vectors = np.asarray(page.vectors, np.float32)
        fields = (
            None
            if page.fields is None
            else [dict(page.field(row)) or None for row in range(len(page))]
        )
        for start in range(0, len(page), BATCH):
            rows = slice(start, start + BATCH)
            self._collection.upsert(
                ids=[str(row) for row in page.ids[rows]],
                embeddings=vectors[rows],
                documents=None if page.texts is None else list(page.texts[rows]),
                metadatas=None if fields is None else fields[rows],
            )

    def query(self, vectors: np.ndarray, k: int) -> list[list[Match]]:
        """As `Store.query`: `score` is the distance."""
        found = self._collection.query(
            query_embeddings=np.asarray(vectors, np.float32),
            n_results=k,
            include=["distances", "documents", "metadatas"],
        )
        columns = (found["ids"], found["distances"], found["documents"], found["metadatas"])
        return [
            [
                Match(row, score, text, more or {})
                for row, score, text, more in zip(*rows, strict=True)
            ]
            for rows in zip(*columns, strict=True)
        ]

    def pages(self, size: int) -> Iterator[Page]:
        """As `Store.pages`."""
        for offset in range(0, self.count(), size):
            yield self._page(offset, size, ["documents", "metadatas"])

    def sample(self, count: int) -> Page:
        """As `Store.sample`: from up to eight places of the collection."""
        rows = self.count()
        starts = np.unique(np.linspace(0, max(0, rows - 1), 8).astype(int))
        size = max(1, count // len(starts))
        if rows <= count:
            starts, size = np.array([0]), count
        pages = [
            self._page(int(start), size, ["documents", "metadatas", "embeddings"])
            for start in starts
        ]
        vectors = [page.vectors for page in pages if page.vectors is not None and len(page)]
        return Page(
            [row for page in pages for row in page.ids],
            [text for page in pages for text in page.texts or ()],
            [fields for page in pages for fields in page.fields or ()],
            np.concatenate(vectors) if vectors else None,
        )

    @contextlib.contextmanager
    def created(self, name: str, record: SpaceRecord) -> Iterator[Chroma]:
        """As `Store.created`: configuration and metadata are those of this one."""
        model = self._client.get_collection(self._collection.name, **self._where)
        own = {key: value for key, value in (model.metadata or {}).items() if key != KEY}
        names = {one.name for one in self._client.list_collections(**self._where)}
        if name not in names:
            model = self._client.create_collection(
                name,
                metadata={**own, KEY: record.to_json()},
                configuration=_plain(model.get_configuration()),
                **self._where,
            )
        else:
            model = self._client.get_collection(name, **self._where)
        new = Chroma(type(self._collection)(self._client, model, embedding_function=None))
        new.claim(record).check(record, new.name, "the new vectors")
        yield new

    def close(self) -> None:
        """As `Store.close`."""
        close = getattr(self._owned, "close", None)  # since Chroma 1.5
        if close is not None:
            close()

    def _metadata(self) -> Mapping[str, Any]:
        return self._client.get_collection(self._collection.name, **self._where).metadata or {}

    def _set(self, record: SpaceRecord) -> None:
        self._client._modify(
            id=self._collection.id,
            new_metadata={**self._metadata(), KEY: record.to_json()},
            **self._where,
        )

    def _check_same_claim(self, claim: str, record: SpaceRecord, error: Exception) -> None:
        """Check that the claim which is there is one of the same space.

        Raises:
            SpaceRefused: it is not.
        """
        try:
            metadata = self._client.get_collection(claim, **self._where).metadata or {}
        except Exception:
            if self.read() is None:  # neither claimed nor recorded: it failed for another reason
                raise error from None
            return
        other = SpaceRecord.from_json(str(metadata.get(KEY)), self.name)
        if not record.is_alike(other):
            raise SpaceRefused(
                f"{self.name} is claimed by a writer of {other} at the same time. Try again; if "
                "none runs, `halimede index adopt --replace`."
            )

    def _page(self, offset: int, size: int, include: Sequence[str]) -> Page:
        rows = self._collection.get(limit=size, offset=offset, include=list(include))
        fields = [dict(one or {}) for one in rows["metadatas"]]
        vectors = rows["embeddings"]
        return Page(
            rows["ids"],
            rows["documents"],
            fields,
            None if vectors is None else np.array(vectors, np.float32),
        )


def of(collection: Any, name: str | None) -> Chroma:
    """Return a collection, or the one of this name of a client.

    Raises:
        InvalidInput: it is neither, or is for asyncio.
    """
    if name is not None and hasattr(collection, "get_collection"):
        collection = collection.get_collection(name, embedding_function=None)
    if not all(hasattr(collection, part) for part in ("upsert", "tenant", "_client")):
        raise InvalidInput(
            f"{type(collection).__name__} is no collection of Chroma; give "
            'client.get_collection("articles").'
        )
    return Chroma(collection)


def connect(place: str, name: str) -> Chroma:
    """Return a collection of a server's URL, or of a folder."""
    package = import_optional("chromadb", EXTRA)
    if "://" in place:
        scheme, _, rest = place.partition("://")
        host, _, port = rest.rstrip("/").partition(":")
        is_tls = scheme == "https"
        token = os.environ.get(TOKEN)
        client = package.HttpClient(
            host=host,
            port=int(port or (443 if is_tls else 8000)),
            ssl=is_tls,
            headers={"X-Chroma-Token": token} if token else None,
        )
    else:
        client = package.PersistentClient(existing_folder(place, "Chroma"))
    names = {collection.name for collection in client.list_collections()}
    if name not in names:
        raise InvalidInput(f"Chroma has no collection {name!r}. Create it first.")
    store = Chroma(client.get_collection(name, embedding_function=None))
    store._owned = client
    return store


def _plain(configuration: Any) -> Any:
    """Return what a new collection is given of a configuration: no embedding function."""
    return {key: value for key, value in configuration.items() if key != "embedding_function"}
