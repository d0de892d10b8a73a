"""Qdrant: the record is a key of the collection's metadata, which Qdrant keeps since 1.16.

Qdrant merges metadata, and has no compare-and-set. So a writer adds a key that has the digest of
its record, and reads all keys after: of two writers of different spaces at least one sees both, and
withdraws its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.index.record import KEY, SpaceRecord
from halimede.index.stores.base import Match, Page, existing_folder
from halimede_ops.errors import InvalidInput, SpaceRefused

EXTRA = "index-qdrant"
OPTIONS = ("text_field", "vector_field")
API_KEY = "QDRANT_API_KEY"
BATCH = 256
"""Points in one request."""


class Qdrant:
    """A collection of Qdrant, or one of its named vectors."""

    keeps_texts = True
    packed = ()
    fields_type = None

    def __init__(
        self, client: Any, collection: str, *, text_field: str = "text", vector_field: str = ""
    ) -> None:
        self._close: Callable[[], None] = lambda: None
        self._client = client
        self._collection = collection
        self._text = text_field
        self._vector = vector_field
        self._models = import_optional("qdrant_client.models", EXTRA)
        self._prefix = f"{KEY}:{vector_field}:" if vector_field else f"{KEY}:"
        if not client.collection_exists(collection):
            raise InvalidInput(f"Qdrant has no collection {collection!r}. Create it first.")
        self._params()  # fails if the vector is not named

    @property
    def name(self) -> str:
        """As `Store.name`."""
        vector = f", vector {self._vector!r}" if self._vector else ""
        return f"the Qdrant collection {self._collection!r}{vector}"

    def refresh(self) -> None:
        """As `Store.refresh`: it always does."""

    def read(self) -> SpaceRecord | None:
        """As `Store.read`."""
        keys = self._keys()
        if len(keys) > 1:
            raise SpaceRefused(
                f"{self.name} is claimed by {len(keys)} writers of different spaces. Try again; "
                "if none runs, `halimede index adopt --replace`."
            )
        return next((SpaceRecord.from_json(str(text), self.name) for text in keys.values()), None)

    def claim(self, record: SpaceRecord) -> SpaceRecord:
        """As `Store.claim`."""
        there = self._keys()
        key = self._key(record)
        if not there:
            self._client.update_collection(self._collection, metadata={key: record.to_json()})
            there = self._keys()
        if len(there) > 1 and key in there:
            self._client.update_collection(self._collection, metadata={key: None})
            raise SpaceRefused(
                f"{self.name} is claimed by a writer of another space at the same time. Try again."
            )
        if not there:
            raise InvalidInput("this Qdrant keeps no metadata of collections; 1.16 or later does.")
        claimed = self.read()
        return record if claimed is None else claimed

    def replace(self, record: SpaceRecord) -> None:
        """As `Store.replace`."""
        old: dict[str, str | None] = dict.fromkeys(self._keys())
        self._client.update_collection(
            self._collection, metadata={**old, self._key(record): record.to_json()}
        )

    def count(self) -> int:
        """As `Store.count`."""
        return int(self._client.count(self._collection, exact=True).count)

    def width(self) -> int:
        """As `Store.width`."""
        return int(self._params().size)

    def write(self, page: Page) -> None:
        """As `Store.write`."""
        vectors = np.asarray(page.vectors, np.float32).tolist()
        points = []
        for row, point in enumerate(page.ids):
            payload = dict(page.field(row))
            if page.text(row) is not None:
                payload[self._text] = page.text(row)
            vector = {self._vector: vectors[row]} if self._vector else vectors[row]
            points.append(
                self._models.PointStruct(id=_point(point), vector=vector, payload=payload)
            )
        for start in range(0, len(points), BATCH):
            self._client.upsert(self._collection, points=points[start : start + BATCH], wait=True)

    def query(self, vectors: np.ndarray, k: int) -> list[list[Match]]:
        """As `Store.query`: `score` is Qdrant's, of the collection's distance."""
        using = self._vector or None
        requests = [
            self._models.QueryRequest(query=vector, limit=k, with_payload=True, using=using)
            for vector in np.asarray(vectors, np.float32).tolist()
        ]
        answers = self._client.query_batch_points(self._collection, requests=requests)
        return [
            [Match(point.id, point.score, *self._split(point.payload)) for point in answer.points]
            for answer in answers
        ]

    def pages(self, size: int) -> Iterator[Page]:
        """As `Store.pages`."""
        offset = None
        while True:
            points, offset = self._client.scroll(
                self._collection, limit=size, offset=offset, with_payload=True, with_vectors=False
            )
            if points:
                yield self._page(points)
            if offset is None:
                return

    def sample(self, count: int) -> Page:
        """As `Store.sample`."""
        drawn = self._models.SampleQuery(sample=self._models.Sample.RANDOM)
        points = self._client.query_points(
            self._collection, query=drawn, limit=count, with_payload=True, with_vectors=True
        ).points
        page = self._page(points)
        rows = [point.vector[self._vector] if self._vector else point.vector for point in points]
        return Page(page.ids, page.texts, page.fields, np.array(rows, np.float32))

    @contextlib.contextmanager
    def created(self, name: str, record: SpaceRecord) -> Iterator[Qdrant]:
        """As `Store.created`: with the distance, options and payload indexes of this one.

        Raises:
            InvalidInput: this collection has several vectors.
        """
        if not self._client.collection_exists(name):
            info = self._client.get_collection(self._collection)
            params = info.config.params
            if isinstance(params.vectors, Mapping) or params.sparse_vectors:
                raise InvalidInput(
                    f"{self.name} has several vectors. Create {name!r} yourself, with all of them."
                )
            own = {k: v for k, v in (info.config.metadata or {}).items() if not _is_ours(k)}
            options = {
                "hnsw_config": _diff(self._models.HnswConfigDiff, info.config.hnsw_config),
                "optimizers_config": _diff(
                    self._models.OptimizersConfigDiff, info.config.optimizer_config
                ),
                "quantization_config": info.config.quantization_config,
                "on_disk_payload": params.on_disk_payload,
                "shard_number": params.shard_number,
                "replication_factor": params.replication_factor,
            }
            self._client.create_collection(
                name,
                vectors_config=params.vectors.model_copy(update={"size": record.dims}),
                metadata={**own, self._key(record): record.to_json()},
                **{key: value for key, value in options.items() if value is not None},
            )
            for field, index in (info.payload_schema or {}).items():
                self._client.create_payload_index(name, field, index.params or index.data_type)
        new = Qdrant(self._client, name, text_field=self._text, vector_field=self._vector)
        new.claim(record).check(record, new.name, "the new vectors")
        yield new

    def close(self) -> None:
        """As `Store.close`."""
        self._close()

    def _keys(self) -> dict[str, Any]:
        """Return the metadata of this vector that are ours."""
        metadata = self._client.get_collection(self._collection).config.metadata or {}
        return {
            key: value
            for key, value in metadata.items()
            if key.rpartition(":")[0] + ":" == self._prefix and value is not None
        }

    def _key(self, record: SpaceRecord) -> str:
        return f"{self._prefix}{record.digest()}"

    def _params(self) -> Any:
        params = self._client.get_collection(self._collection).config.params.vectors
        named = params if isinstance(params, Mapping) else {"": params}
        if self._vector not in named:
            raise InvalidInput(
                f"the Qdrant collection {self._collection!r} has no vector {self._vector!r}; give "
                f"vector_field as one of {', '.join(map(repr, named))}."
            )
        return named[self._vector]

    def _page(self, points: list[Any]) -> Page:
        split = [self._split(point.payload) for point in points]
        texts, fields = [text for text, _ in split], [others for _, others in split]
        return Page([str(point.id) for point in points], texts, fields)

    def _split(self, payload: Mapping[str, Any] | None) -> tuple[str | None, dict[str, Any]]:
        """Return the text of a payload, and what else it has."""
        fields = dict(payload or {})
        text = fields.pop(self._text, None)
        return (text, fields) if isinstance(text, str) else (None, dict(payload or {}))


def of(
    client: Any, name: str | None, *, text_field: str = "text", vector_field: str = ""
) -> Qdrant:
    """Return a collection of an open client.

    Raises:
        InvalidInput: the client is for asyncio, or the name is missing.
    """
    if name is None or not hasattr(client, "collection_exists"):
        raise InvalidInput('give the collection\'s name too: halimede.guard(client, "articles").')
    if type(client).__name__.startswith("Async"):
        raise InvalidInput("the guard takes a QdrantClient; open one beside the AsyncQdrantClient.")
    return Qdrant(client, name, text_field=text_field, vector_field=vector_field)


def connect(place: str, name: str, **options: str) -> Qdrant:
    """Return a collection of a server's URL, or of a folder."""
    package = import_optional("qdrant_client", EXTRA)
    if "://" in place:
        client = package.QdrantClient(url=place, api_key=os.environ.get(API_KEY))
    else:
        client = package.QdrantClient(path=existing_folder(place, "Qdrant"))
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        store = Qdrant(client, name, **options)
        store._close = stack.pop_all().close
    return store


def _point(value: Any) -> Any:
    """Return a point's id: an integer, also as text, or a UUID."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def _diff(kind: Any, config: Any) -> Any:
    """Return what a new collection is given of these options."""
    if config is None:
        return None
    facts = config.model_dump(exclude_none=True)
    return kind(**{key: value for key, value in facts.items() if key in kind.model_fields})


def _is_ours(key: str) -> bool:
    return key.partition(":")[0] == KEY
