"""Every store that the guard knows, in its embedded mode: real, and empty at the start."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import lancedb
import numpy as np
import psycopg
import pyarrow as pa
import qdrant_client
from filelock import FileLock
from qdrant_client import models

from halimede import Guard, guard
from halimede_tools.build.samples import corpus

DIMS = 384
CHROMA = (
    "bcrypt==5.0.0",
    "chromadb==1.5.9",
    "importlib-resources==7.1.0",
    "mmh3==5.3.1",
    "opentelemetry-exporter-otlp-proto-common==1.45.2",
    "opentelemetry-exporter-otlp-proto-grpc==1.45.2",
    "overrides==7.7.0",
    "pybase64==1.5.1",
    "pypika==0.51.1",
)
"""Chroma and what it imports that the environment lacks. Its other requirements are not installed:
plain onnxruntime would replace the files of onnxruntime-openvino.
"""


def import_chroma(cache: Path) -> Any:
    """Chroma from a folder of its own, which is filled once, behind all others on the path."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {CHROMA}".encode()).hexdigest()[:16]
    folder = cache / f"chroma-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"chroma-{digest}.lock"):
        if not folder.exists():
            beside = folder.with_suffix(".new")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(beside), *CHROMA], check=True)
            beside.rename(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    import chromadb

    return chromadb


class Collections(Protocol):
    """Collections of one store."""

    keeps_texts: bool
    address: str
    """Address of the store, before a collection's name."""

    def create(self, name: str, dims: int = DIMS) -> None:
        """An empty collection, with metadata of its user."""

    def guard(self, name: str) -> Guard:
        """A guard on a client of its own, where the store allows several."""

    def fill(self, name: str, ids: Sequence[int], vectors: np.ndarray, texts: list[str]) -> None:
        """Write vectors without the guard."""

    def own_metadata(self, name: str) -> Any:
        """The metadata that the user has set."""

    def at(self, name: str) -> str:
        """Address of a collection."""


class Qdrant:
    keeps_texts = True
    mine = {"mine": "kept"}

    def __init__(self, folder: Path) -> None:
        self.client = qdrant_client.QdrantClient(path=str(folder))
        self.address = f"qdrant:{folder}"

    def create(self, name: str, dims: int = DIMS) -> None:
        params = models.VectorParams(size=dims, distance=models.Distance.COSINE)
        self.client.create_collection(name, vectors_config=params, metadata=dict(self.mine))

    def guard(self, name: str) -> Guard:
        return guard(self.client, name)

    def fill(self, name: str, ids: Sequence[int], vectors: np.ndarray, texts: list[str]) -> None:
        points = [
            models.PointStruct(id=i, vector=vector, payload={"text": text, "n": i})
            for i, vector, text in zip(ids, vectors.tolist(), texts, strict=True)
        ]
        self.client.upsert(name, points)

    def own_metadata(self, name: str) -> Any:
        metadata = self.client.get_collection(name).config.metadata
        return {key: value for key, value in metadata.items() if "halimede" not in key}

    def at(self, name: str) -> str:
        self.client.close()  # a folder is of one client
        return f"{self.address}#{name}"


class Chroma:
    keeps_texts = True
    mine = {"mine": "kept", "hnsw:space": "cosine"}

    def __init__(self, folder: Path, chromadb: Any) -> None:
        self.client = chromadb.PersistentClient(str(folder))
        self.address = f"chroma:{folder}"

    def create(self, name: str, dims: int = DIMS) -> None:
        self.client.create_collection(name, metadata=dict(self.mine), embedding_function=None)

    def guard(self, name: str) -> Guard:
        return guard(self.client.get_collection(name, embedding_function=None))

    def fill(self, name: str, ids: Sequence[int], vectors: np.ndarray, texts: list[str]) -> None:
        self.client.get_collection(name, embedding_function=None).add(
            ids=list(map(str, ids)),
            embeddings=vectors,
            documents=texts,
            metadatas=[{"n": i} for i in ids],
        )

    def own_metadata(self, name: str) -> Any:
        metadata = self.client.get_collection(name, embedding_function=None).metadata
        return {key: value for key, value in metadata.items() if key != "halimede"}

    def at(self, name: str) -> str:
        return f"{self.address}#{name}"


class LanceDB:
    keeps_texts = True
    mine = {b"mine": b"kept"}, {b"column": b"kept"}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.address = f"lancedb:{folder}"

    def create(self, name: str, dims: int = DIMS) -> None:
        table, column = self.mine
        fields = [
            pa.field("id", pa.int64()),
            pa.field("text", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), dims), metadata=column),
            pa.field("n", pa.int32()),
            pa.field("at", pa.timestamp("us")),
        ]
        lancedb.connect(self.folder).create_table(name, schema=pa.schema(fields, metadata=table))

    def guard(self, name: str) -> Guard:
        return guard(lancedb.connect(self.folder).open_table(name))

    def fill(self, name: str, ids: Sequence[int], vectors: np.ndarray, texts: list[str]) -> None:
        rows = [
            {"id": i, "text": text, "vector": vector, "n": i, "at": None}
            for i, vector, text in zip(ids, vectors, texts, strict=True)
        ]
        lancedb.connect(self.folder).open_table(name).add(rows)

    def own_metadata(self, name: str) -> Any:
        schema = lancedb.connect(self.folder).open_table(name).schema
        column = schema.field("vector").metadata
        return schema.metadata, {k: v for k, v in column.items() if k != b"halimede"}

    def at(self, name: str) -> str:
        return f"{self.address}#{name}"


class PgVector:
    keeps_texts = True
    mine = "vectors of articles"

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.address = uri
        self.connection = psycopg.connect(uri, autocommit=True)

    def create(self, name: str, dims: int = DIMS) -> None:
        self.connection.execute(
            f"CREATE TABLE {name} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text, "
            f"embedding vector({dims}), n integer, at timestamptz DEFAULT now(), price numeric)"
        )
        self.connection.execute(f"CREATE INDEX ON {name} USING hnsw (embedding vector_l2_ops)")
        self.connection.execute(f"COMMENT ON COLUMN {name}.embedding IS '{self.mine}'")

    def guard(self, name: str) -> Guard:
        return guard(psycopg.connect(self.uri, autocommit=True), name)

    def fill(self, name: str, ids: Sequence[int], vectors: np.ndarray, texts: list[str]) -> None:
        for i, vector, text in zip(ids, vectors.tolist(), texts, strict=True):
            self.connection.execute(
                f"INSERT INTO {name} (id, text, embedding, n, price) OVERRIDING SYSTEM VALUE "
                "VALUES (%s, %s, %s, %s, %s)",
                (i, text, str(vector), i, f"{i}.10000000000000000001"),
            )

    def own_metadata(self, name: str) -> Any:
        query = "SELECT col_description(%s::regclass, 3)"
        [comment] = self.connection.execute(query, (name,)).fetchone()
        return comment.splitlines()[0]

    def at(self, name: str) -> str:
        return f"{self.uri}#{name}"


class Faiss:
    keeps_texts = False
    mine = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.address = f"faiss:{folder}/"

    def create(self, name: str, dims: int = DIMS) -> None:
        """The first write makes the file."""

    def guard(self, name: str) -> Guard:
        return guard(self.folder / name)

    def fill(self, name: str, ids: Sequence[int], vectors: np.ndarray, texts: list[str]) -> None:
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        index.add_with_ids(vectors, np.array(ids, np.int64))
        faiss.write_index(index, str(self.folder / name))

    def own_metadata(self, name: str) -> Any:
        return None

    def at(self, name: str) -> str:
        return f"{self.address}{name}"


KINDS = ("qdrant", "chroma", "lancedb", "pgvector", "faiss")
TEXTS = [f"article {i} about {subject}" for i, subject in enumerate(corpus.SENTENCES[:40])]
