"""Haystack's components, in Haystack's own pipelines."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # it would ask the network

import pytest
from framework_clients import DOCUMENTS, QUERY, TEXTS, Arguments, assert_close
from haystack import Document, Pipeline
from haystack.components.embedders.types import DocumentEmbedder, TextEmbedder
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from halimede import Embedder, InvalidConfig, InvalidInput, Reranker
from halimede.integrations.haystack import (
    HalimedeDocumentEmbedder,
    HalimedeRanker,
    HalimedeTextEmbedder,
)

pytest_plugins = ("framework_fixtures",)
HASH = {"models": {"m": {"provider": "hash"}}}


def test_a_pipeline_finds_the_answer(default_model: dict[str, Any]) -> None:
    """Documents are embedded and written; a query is embedded and finds its document, also when
    the pipeline was written to YAML and read again.
    """
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    writing = Pipeline()
    writing.add_component("embedder", HalimedeDocumentEmbedder(**default_model))
    writing.add_component("writer", DocumentWriter(store))
    writing.connect("embedder.documents", "writer.documents")
    writing.run({"embedder": {"documents": [Document(content=text) for text in DOCUMENTS]}})

    searching = Pipeline()
    searching.add_component("embedder", HalimedeTextEmbedder(**default_model))
    ours = ["halimede.integrations.haystack"]
    read = Pipeline.loads(searching.dumps(), allowed_modules=ours)
    read.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    read.connect("embedder.embedding", "retriever.query_embedding")
    [found] = read.run({"embedder": {"text": QUERY}})["retriever"]["documents"]
    assert found.content == "Penguins swim."


def test_queries_and_documents_have_their_prompts(small_model: Arguments) -> None:
    """Of a model with prompts, in both `run` and `run_async`."""
    documents = [Document(content=text, meta={"title": "a"}) for text in TEXTS]
    with Embedder(**small_model("prompted")) as client:
        texts = HalimedeTextEmbedder(embedder=client)
        docs = HalimedeDocumentEmbedder(embedder=client)
        titled = HalimedeDocumentEmbedder(embedder=client, meta_fields_to_embed=["title", "no"])
        [query] = client.embed([QUERY], input_type="query").vectors
        expected = client.embed(TEXTS, input_type="document").vectors
        with_titles = client.embed([f"a\n{text}" for text in TEXTS], input_type="document").vectors

        async def asked() -> tuple[Any, Any]:
            return await texts.run_async(QUERY), await docs.run_async(documents)

        for text, many in ((texts.run(QUERY), docs.run(documents)), asyncio.run(asked())):
            assert_close(text["embedding"], query)
            assert text["meta"]["model"] == "prompted"
            assert text["meta"]["usage"]["total_tokens"] > 0
            assert_close([one.embedding for one in many["documents"]], expected)
        given = titled.run(documents)["documents"]
        assert_close([one.embedding for one in given], with_titles)
        assert documents[0].embedding is None
        assert docs.run([]) == {"documents": [], "meta": {}}


def test_a_ranker_orders_documents(small_model: Arguments) -> None:
    """The best first, as copies with scores, in both `run` and `run_async`."""
    arguments = small_model("reranker")
    documents = [Document(content=text) for text in DOCUMENTS]
    with Reranker(**arguments) as client:
        expected = client.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
    ranker = HalimedeRanker(**arguments, top_k=2)
    for answer in (
        ranker.run(QUERY, documents),
        asyncio.run(ranker.run_async(QUERY, documents)),
        HalimedeRanker(**arguments).run(QUERY, documents, top_k=2),
    ):
        ordered = answer["documents"]
        assert tuple(one.content for one in ordered) == expected.documents
        assert_close([one.score for one in ordered], expected.scores)
    with pytest.raises(InvalidInput, match="top_k"):
        ranker.run(QUERY, documents, top_k=0)


@pytest.mark.parametrize(
    "component", [HalimedeTextEmbedder, HalimedeDocumentEmbedder, HalimedeRanker]
)
def test_components_are_written_and_read(component: Any) -> None:
    """With their arguments; a component with a client of yours is refused."""
    data = component("m", config=HASH, timeout_s=3).to_dict()
    again = component.from_dict(data)
    assert type(again) is component
    assert again.to_dict() == data
    assert data["init_parameters"]["config"] == HASH
    own = (
        {"reranker": Reranker(config=HASH)}
        if component is HalimedeRanker
        else {"embedder": Embedder(config=HASH)}
    )
    with pytest.raises(InvalidConfig, match="cannot be written"):
        component(**own).to_dict()


def test_components_are_haystacks_kinds() -> None:
    """Haystack's protocols of embedders hold."""
    text: TextEmbedder = HalimedeTextEmbedder(config=HASH)
    documents: DocumentEmbedder = HalimedeDocumentEmbedder(config=HASH)
    assert len(text.run(text="a")["embedding"]) == 384
    assert len(documents.run(documents=[Document(content="a")])["documents"][0].embedding) == 384
