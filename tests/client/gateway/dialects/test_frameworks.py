"""Frameworks that embed through other APIs: LangChain, LlamaIndex and LiteLLM, unmodified."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network

import litellm
import numpy as np
import openai
import pytest
import small_models
from conftest import MODEL, free_options
from gateways import assert_alike, gateway, triton_model
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from halimede import Reranker
from halimede_tools.build.plan import build, build_request
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TEXTS = ["hello world", "What is Triton?", "An ocelot sleeps in the rain.", "naïve 🦊 中文"]
QUERY = "which bird swims?"
DOCUMENTS = ["Penguins swim.", "Wool socks keep feet warm.", "The museum opens at nine."]
ENCODINGS = Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers"
"""A folder with cl100k_base, which tiktoken would fetch from the network."""


@pytest.fixture(autouse=True)
def _encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ENCODINGS))


def langchain(address: str, **options: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        model=MODEL, base_url=f"{address}/v1", api_key="any", max_retries=0, **options
    )


class TestLangChain(EmbeddingsIntegrationTests):
    """LangChain's own tests of an embedding model."""

    @pytest.fixture(autouse=True)
    def _address(self, address: str) -> None:
        self.address = address

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": f"{self.address}/v1",
            "api_key": "any",
            "check_embedding_ctx_length": False,
        }

    test_aembed_query = pytest.mark.asyncio(EmbeddingsIntegrationTests.test_aembed_query)
    test_aembed_documents = pytest.mark.asyncio(EmbeddingsIntegrationTests.test_aembed_documents)


def test_langchain(address: str, vectors: Any) -> None:
    model = langchain(address, check_embedding_ctx_length=False)
    assert_alike(model.embed_documents(TEXTS), vectors(TEXTS))
    assert_alike([model.embed_query(TEXTS[0])], vectors(TEXTS[:1]))
    assert_alike(asyncio.run(model.aembed_documents(TEXTS)), vectors(TEXTS))
    small = langchain(address, check_embedding_ctx_length=False, dimensions=128)
    expected = vectors(TEXTS)[:, :128]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_alike(small.embed_documents(TEXTS), expected)


def test_langchains_token_ids_are_refused(address: str) -> None:
    """Its default sends ids of cl100k_base, which are no ids of the model's."""
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain(address).embed_documents(TEXTS)


def test_langchains_token_ids_are_decoded(server: wheel.Server, vectors: Any) -> None:
    with gateway(triton_model(server), decode_tokens="cl100k_base") as running:
        model = langchain(running)
        assert_alike(model.embed_documents(TEXTS), vectors(TEXTS))
        assert_alike(asyncio.run(model.aembed_documents(TEXTS)), vectors(TEXTS))


def test_llama_index(address: str, vectors: Any) -> None:
    model = OpenAILikeEmbedding(
        model_name=MODEL, api_base=f"{address}/v1", api_key="any", max_retries=0
    )
    assert_alike(model.get_text_embedding_batch(TEXTS), vectors(TEXTS))
    assert_alike([model.get_query_embedding(TEXTS[0])], vectors(TEXTS[:1]))
    assert_alike(asyncio.run(model.aget_text_embedding_batch(TEXTS)), vectors(TEXTS))


def litellm_vectors(answer: Any) -> list[list[float]]:
    return [row["embedding"] for row in answer.data]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm(address: str, vectors: Any, provider: str) -> None:
    options = {
        "model": f"{provider}/{MODEL}",
        "api_base": f"{address}/v1",
        "api_key": "any",
        "input": TEXTS,
    }
    answer = litellm.embedding(**options)
    assert_alike(litellm_vectors(answer), vectors(TEXTS))
    assert answer.usage.total_tokens > len(TEXTS)
    assert_alike(litellm_vectors(asyncio.run(litellm.aembedding(**options))), vectors(TEXTS))


def test_litellm_passes_dimensions_to_vllm_alone(address: str, vectors: Any) -> None:
    options = {"api_base": f"{address}/v1", "api_key": "any", "input": TEXTS, "dimensions": 128}
    answer = litellm.embedding(model=f"hosted_vllm/{MODEL}", **options)
    expected = vectors(TEXTS)[:, :128]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_alike(litellm_vectors(answer), expected)
    with pytest.raises(litellm.UnsupportedParamsError):
        litellm.embedding(model=f"openai/{MODEL}", **options)


def test_litellms_errors(address: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="no model of this name"):
        litellm.embedding(
            model="openai/nothing", api_base=f"{address}/v1", api_key="any", input=["a"]
        )


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    """A running Triton with a small reranker."""
    folder = tmp_path_factory.mktemp("reranker")
    home = Settings(home=folder / "home", repository=folder / "repository")
    source = small_models.bert_reranker(folder / "reranker")
    build(build_request(str(source), "reranker", precisions=("fp32",)), home)
    with wheel.serve(home.repository, home.python_backend, folder, free_options()) as running:
        yield running


def test_litellm_ranks_as_cohere(reranker: wheel.Server) -> None:
    with Reranker(url=reranker.grpc_address, model="reranker") as client:
        expected = client.rank(QUERY, DOCUMENTS)
    with gateway(triton_model(reranker, "reranker")) as running:
        options = {
            "model": "cohere/reranker",
            "api_base": running,
            "api_key": "any",
            "query": QUERY,
            "documents": DOCUMENTS,
        }
        asked = litellm.rerank(**options), asyncio.run(litellm.arerank(**options))
        for answer in asked:
            assert [row["index"] for row in answer.results] == expected.indices.tolist()
            scores = [row["relevance_score"] for row in answer.results]
            assert np.allclose(scores, expected.scores, atol=1e-6)
        [best] = litellm.rerank(**options, top_n=1).results
        assert best["index"] == expected.indices[0]
