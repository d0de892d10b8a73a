"""LlamaIndex's classes, in LlamaIndex's own pipelines."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from framework_clients import DOCUMENTS, QUERY, TEXTS, Arguments, assert_close
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings.utils import resolve_embed_model
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import Document, NodeWithScore, TextNode

from halimede import Embedder, InvalidConfig, InvalidInput, Reranker, UnsupportedInput
from halimede.integrations.llama_index import (
    HalimedeEmbedding,
    HalimedeRerank,
    sparse_functions,
)
from halimede.testing import FakeProvider

pytest_plugins = ("framework_fixtures",)


def test_queries_and_texts_have_their_prompts(small_model: Arguments) -> None:
    """Of a model with prompts, in both the blocking and the asyncio methods."""
    with Embedder(**small_model("prompted")) as client:
        texts = client.embed(TEXTS, input_type="document").vectors
        [query] = client.embed([QUERY], input_type="query").vectors
        model = HalimedeEmbedding(embedder=client)
        assert_close(model.get_text_embedding_batch(TEXTS), texts)
        assert_close(model.get_text_embedding(TEXTS[0]), texts[0])
        assert_close(model.get_query_embedding(QUERY), query)

        async def asked() -> list[Any]:
            return [
                await model.aget_text_embedding_batch(TEXTS),
                await model.aget_text_embedding(TEXTS[0]),
                await model.aget_query_embedding(QUERY),
            ]

        batch, one, question = asyncio.run(asked())
        assert_close(batch, texts)
        assert_close(one, texts[0])
        assert_close(question, query)


def test_the_default_model_embeds_an_index(default_model: dict[str, Any]) -> None:
    """An index of LlamaIndex's finds the text that answers the question."""
    model = HalimedeEmbedding(**default_model)
    assert (model.model_name, model.embed_batch_size) == ("all-MiniLM-L6-v2", 1024)
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in DOCUMENTS], embed_model=model
    )
    [found] = index.as_retriever(similarity_top_k=1).retrieve(QUERY)
    assert found.get_content() == "Penguins swim."
    [again] = asyncio.run(index.as_retriever(similarity_top_k=1).aretrieve(QUERY))
    assert again.get_content() == "Penguins swim."


def test_a_reranker_orders_nodes(small_model: Arguments) -> None:
    """The best first, with the reranker's scores; both methods give the same."""
    arguments = small_model("reranker")
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]
    with Reranker(**arguments) as client:
        expected = client.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
    model = HalimedeRerank(**arguments, top_n=2)
    for ordered in (
        model.postprocess_nodes(nodes, query_str=QUERY),
        asyncio.run(model.apostprocess_nodes(nodes, query_str=QUERY)),
    ):
        assert tuple(node.get_content() for node in ordered) == expected.documents
        assert_close([node.score for node in ordered], expected.scores)
    assert [node.score for node in nodes] == [0.5] * 3
    with pytest.raises(InvalidInput, match="query"):
        model.postprocess_nodes(nodes)


def test_sparse_functions_give_ids_and_weights(small_model: Arguments) -> None:
    """In the two lists that LlamaIndex's store on Qdrant takes."""
    arguments = small_model("splade")
    with Embedder(**arguments) as client:
        expected = client.embed_sparse(TEXTS, input_type="document")
    ids, weights = sparse_functions(**arguments).document(TEXTS)
    assert ids == [row.tolist() for row in expected.ids]
    for given, row in zip(weights, expected.weights, strict=True):
        assert_close(given, row)
    assert len(sparse_functions(**arguments).query([QUERY])[0]) == 1


def test_components_are_llama_indexs(embedder: Embedder) -> None:
    """They run in an ingestion pipeline, are copied to other processes, and name their model."""
    model = HalimedeEmbedding(
        "m", config={"models": {"m": {"provider": "hash"}}}, num_workers=2, dimensions=8
    )
    assert resolve_embed_model(model) is model
    nodes = IngestionPipeline(transformations=[model]).run(documents=[Document(text="a")])
    assert len(nodes[0].embedding) == 8
    assert model.to_dict()["model_name"] == "m"
    assert model.to_dict()["dimensions"] == 8
    copy = pickle.loads(pickle.dumps(model))
    assert copy.get_query_embedding("a") == model.get_query_embedding("a")
    with pytest.raises(InvalidConfig, match="client"):
        HalimedeEmbedding.from_dict(model.to_dict())
    far = HalimedeRerank("m", url="127.0.0.1:1", top_n=3)
    again = HalimedeRerank.from_dict(far.to_dict())
    assert again.to_dict() == far.to_dict()
    assert (again.url, again.top_n, again.model) == ("127.0.0.1:1", 3, "m")
    with pytest.raises(InvalidConfig, match="url"):
        HalimedeEmbedding(embedder=embedder, url="127.0.0.1:1")
    with pytest.raises(ValueError, match="embed_batch_size"):
        HalimedeEmbedding(embedder=embedder, embed_batch_size=0)
    only = Embedder(providers=[FakeProvider(kind="late_interaction")])
    with pytest.raises(UnsupportedInput, match="sparse"):
        sparse_functions(embedder=only).query(["a"])
