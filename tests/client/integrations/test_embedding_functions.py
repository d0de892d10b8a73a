"""The embedding functions of LanceDB, DSPy and Chroma, in these libraries themselves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import documents
import dspy
import lancedb
import numpy as np
import pytest
from conftest import MODEL
from framework_clients import DOCUMENTS, QUERY, TEXTS, Arguments, assert_close
from index_stores import import_chroma
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector

from halimede import Embedder, InvalidConfig
from halimede.integrations.dspy import dspy_embedder
from halimede.integrations.lancedb import HalimedeEmbeddingFunction
from halimede.testing import FakeProvider
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

pytest_plugins = ("framework_fixtures",)


MISSING = """
import importlib, sys
needed = {
    "langchain": ("langchain_core", "langchain"),
    "langchain_qdrant": ("langchain_qdrant", "langchain-qdrant"),
    "llama_index": ("llama_index", "llama-index"),
    "haystack": ("haystack", "haystack"),
    "dspy": ("dspy", "dspy"),
    "lancedb": ("lancedb", "index-lancedb"),
    "chroma": ("chromadb", "index-chroma"),
}
for module, (package, extra) in needed.items():
    sys.modules[package] = None
    try:
        importlib.import_module(f"halimede.integrations.{module}")
    except importlib.import_module("halimede").MissingExtra as error:
        assert f"pip install 'halimede[{extra}]'" in str(error), error
    else:
        raise AssertionError(module)
"""


def test_a_missing_package_names_its_extra() -> None:
    """Of every framework, at the import of its module."""
    subprocess.run([sys.executable, "-c", MISSING], check=True)


def test_a_lancedb_table_embeds_its_texts_and_queries(
    default_model: dict[str, Any], tmp_path: Path
) -> None:
    """By the name that it keeps, also when it is opened again."""
    function = get_registry().get("halimede").create(model=MODEL, **default_model)

    class Text(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path).create_table("texts", schema=Text)
    table.add([{"text": text} for text in DOCUMENTS])
    again = lancedb.connect(tmp_path).open_table("texts")
    [found] = again.search(QUERY).limit(1).to_list()
    assert found["text"] == "Penguins swim."
    with Embedder(model=MODEL, **default_model) as client:
        expected = client.embed(DOCUMENTS, input_type="document").vectors
    assert_close(again.to_pandas()["vector"].tolist(), expected)


def test_lancedb_has_prompts_for_queries_and_texts(small_model: Arguments) -> None:
    """Of a model with prompts."""
    arguments = small_model("prompted")
    function = HalimedeEmbeddingFunction.create(**arguments, dimensions=16)
    assert function.ndims() == 16
    with Embedder(**arguments) as client:
        query = client.embed(QUERY, input_type="query", dimensions=16).vectors
        texts = client.embed(TEXTS, input_type="document", dimensions=16).vectors
    assert_close(function.compute_query_embeddings(QUERY), query)
    assert_close(function.compute_source_embeddings(TEXTS), texts)


def test_dspy_retrieves(default_model: dict[str, Any]) -> None:
    """DSPy's retriever finds the answer with the embedder."""
    embedder = dspy_embedder(MODEL, **default_model)
    search = dspy.retrievers.Embeddings(embedder=embedder, corpus=DOCUMENTS, k=1)
    assert search(QUERY).passages == ["Penguins swim."]
    assert embedder(QUERY).shape == (384,)
    assert asyncio.run(embedder.acall(TEXTS)).shape == (4, 384)


def test_dspys_cache_never_answers_for_another_model() -> None:
    """Two embedders of equal source text and different models have their own vectors."""
    spaces = [{"a": [1.0, 0.0]}, {"a": [0.0, 1.0]}]
    clients = [Embedder(providers=[FakeProvider(vectors=vectors)]) for vectors in spaces]
    given = [dspy_embedder(embedder=client)("a") for client in clients]
    assert np.array_equal(given, np.eye(2))


@pytest.fixture(scope="module")
def chromadb(settings: Settings) -> Any:
    """Chroma from a folder of its own: it requires plain onnxruntime, which must not be here."""
    return import_chroma(settings.home / "test-packages")


def test_chroma_embeds_documents_and_queries(chromadb: Any, tmp_path: Path) -> None:
    """A collection keeps the function, finds by it when it is opened again, and refuses another
    model.
    """
    from halimede.integrations.chroma import HalimedeEmbeddingFunction as Function

    config = {"models": {"m": {"provider": "hash"}}}
    function = Function("m", config=config, dimensions=64)
    client = chromadb.PersistentClient(str(tmp_path))
    texts = client.create_collection("texts", embedding_function=function)
    texts.add(ids=["a", "b", "c"], documents=DOCUMENTS)
    again = chromadb.PersistentClient(str(tmp_path)).get_collection("texts")
    found = again.query(
        query_texts=[DOCUMENTS[1]], n_results=1, include=["embeddings", "documents"]
    )
    assert found["documents"] == [[DOCUMENTS[1]]]
    with Embedder(model="m", config=config) as embedder:
        assert_close(found["embeddings"][0], embedder.embed(DOCUMENTS[1], dimensions=64).vectors)
    with pytest.raises(ValueError, match="dimensions"):
        function.validate_config_update(function.get_config(), {"model": "m", "dimensions": 32})
    with pytest.raises(InvalidConfig):
        Function("other", config=config)


def test_the_pages_program_for_chroma_runs(
    chromadb: Any, server: wheel.Server, tmp_path: Path
) -> None:
    """As written, on this server's address; test_readme.py runs the others."""
    [block] = [one for one in documents.blocks("python") if "import chromadb" in one.code
               and "integrations.chroma" in one.code]  # fmt: skip
    code = block.code.replace("127.0.0.1:8001", server.grpc_address)
    folder = Path(chromadb.__file__).parents[1]
    code = f"import sys; sys.path.append({str(folder)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "ferry" in done.stdout
