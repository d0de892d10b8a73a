"""LangChain's classes, with LangChain's own standard tests."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from framework_clients import DOCUMENTS, QUERY, TEXTS, Arguments, assert_close
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qdrant import QdrantVectorStore, RetrievalMode
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from qdrant_client import QdrantClient, models

from halimede import Embedder, InvalidConfig, Reranker, UnsupportedInput
from halimede.integrations.langchain import HalimedeEmbeddings, HalimedeReranker
from halimede.integrations.langchain_qdrant import HalimedeSparseEmbeddings
from halimede.testing import FakeProvider

pytest_plugins = ("framework_fixtures",)


class TestUnit(EmbeddingsUnitTests):
    """LangChain's unit tests of an embedding model, and its address from the environment."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return HalimedeEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "any", "providers": [FakeProvider()]}


class TestIntegration(EmbeddingsIntegrationTests):
    """LangChain's integration tests, on a real Triton and in this process."""

    @pytest.fixture(autouse=True)
    def _arguments(self, default_model: dict[str, Any]) -> None:
        self.arguments = default_model

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return HalimedeEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return self.arguments

    test_aembed_query = pytest.mark.asyncio(EmbeddingsIntegrationTests.test_aembed_query)
    test_aembed_documents = pytest.mark.asyncio(EmbeddingsIntegrationTests.test_aembed_documents)


def test_queries_and_documents_have_their_prompts(small_model: Arguments) -> None:
    """Of a model with prompts, in both the blocking and the asyncio methods."""
    arguments = small_model("prompted")
    with Embedder(**arguments) as client:
        documents = client.embed(TEXTS, input_type="document").vectors
        [query] = client.embed([QUERY], input_type="query").vectors
        model = HalimedeEmbeddings(embedder=client)
        assert_close(model.embed_documents(TEXTS), documents)
        assert_close(model.embed_query(QUERY), query)
        assert_close(asyncio.run(model.aembed_documents(TEXTS)), documents)
        assert_close(asyncio.run(model.aembed_query(QUERY)), query)
        small = HalimedeEmbeddings(embedder=client, dimensions=16)
        assert len(small.embed_query(QUERY)) == len(small.embed_documents(TEXTS)[0]) == 16


def test_a_reranker_compresses_documents(small_model: Arguments) -> None:
    """The best first, as copies with their scores; both methods give the same."""
    arguments = small_model("reranker")
    given = [Document(text, metadata={"place": place}) for place, text in enumerate(DOCUMENTS)]
    with Reranker(**arguments) as client:
        expected = client.rank(QUERY, DOCUMENTS, top_k=2)
    model = HalimedeReranker(**arguments, top_n=2)
    for ordered in (
        model.compress_documents(given, QUERY),
        asyncio.run(model.acompress_documents(given, QUERY)),
    ):
        assert [one.metadata["place"] for one in ordered] == expected.indices.tolist()
        assert_close([one.metadata["relevance_score"] for one in ordered], expected.scores)
    assert "relevance_score" not in given[0].metadata
    assert model.compress_documents([], QUERY) == []


def test_sparse_weights_search_in_qdrant(small_model: Arguments) -> None:
    """Qdrant's hybrid search, with vectors of one model and weights of another."""
    dense = HalimedeEmbeddings(**small_model("prompted"))
    sparse = HalimedeSparseEmbeddings(**small_model("splade"))
    client = QdrantClient(":memory:")
    client.create_collection(
        "texts",
        vectors_config={"": models.VectorParams(size=64, distance=models.Distance.COSINE)},
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    store = QdrantVectorStore(
        client,
        "texts",
        embedding=dense,
        sparse_embedding=sparse,
        retrieval_mode=RetrievalMode.HYBRID,
        sparse_vector_name="sparse",
    )
    store.add_texts(DOCUMENTS)
    [found] = store.similarity_search(DOCUMENTS[1], k=1)
    assert found.page_content == DOCUMENTS[1]
    first = sparse.embed_query(QUERY)
    assert first == asyncio.run(sparse.aembed_query(QUERY))
    assert len(first.indices) == len(set(first.indices)) == len(first.values) > 0
    assert sparse.embed_documents(TEXTS) == asyncio.run(sparse.aembed_documents(TEXTS))


def test_a_store_and_a_retriever(embedder: Embedder, reranker: Reranker) -> None:
    """LangChain's own store retrieves with the embeddings; the reranker orders what it found."""
    store = InMemoryVectorStore(HalimedeEmbeddings(embedder=embedder))
    store.add_texts(["a blue whale", "the red fox", "a red house"])
    found = store.as_retriever(search_kwargs={"k": 3}).invoke("red fox")
    best = HalimedeReranker(reranker=reranker, top_n=1).compress_documents(found, "red fox")
    assert [one.page_content for one in best] == ["the red fox"]


def test_arguments_are_checked(embedder: Embedder) -> None:
    """Errors name what is wrong; a copy in another process works."""
    with pytest.raises(InvalidConfig, match="url"):
        HalimedeEmbeddings(embedder=embedder, url="127.0.0.1:1")
    with pytest.raises(InvalidConfig, match="give Reranker"):
        HalimedeReranker(reranker=embedder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_n"):
        HalimedeReranker("any", top_n=0)
    with pytest.raises(UnsupportedInput, match="sparse"):
        only = Embedder(providers=[FakeProvider(kind="late_interaction")])
        HalimedeSparseEmbeddings(embedder=only).embed_query("a")
    copy = pickle.loads(
        pickle.dumps(HalimedeEmbeddings(config={"models": {"m": {"provider": "hash"}}}))
    )
    assert len(copy.embed_query("a")) == 384
