"""Jina's fields of an embedding, with bodies as its documentation has them."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from conftest import MODEL
from gateways import Kinds, assert_alike
from sentence_transformers.util.quantization import quantize_embeddings

from halimede import Embedder

TEXTS = ["hello world", "What is Triton?", "An ocelot sleeps in the rain."]
LONG = "An ocelot sleeps in the rain. " * 60


def embed(http: httpx.Client, texts: list[str] = TEXTS, **fields: Any) -> httpx.Response:
    return http.post("/v1/embeddings", json={"model": MODEL, "input": texts, **fields})


def rows(answer: httpx.Response) -> Any:
    return [row["embedding"] for row in answer.json()["data"]]


@pytest.mark.parametrize("field", ["embedding_type", "encoding_type"])
@pytest.mark.parametrize("name", ["float", "binary", "ubinary"])
def test_types_are_of_the_same_vectors(
    http: httpx.Client, vectors: Any, field: str, name: Any
) -> None:
    """The second field is the first's name in LlamaIndex."""
    given = rows(embed(http, **{field: name}))
    if name == "float":
        assert_alike(given, vectors(TEXTS))
    else:
        floats = np.array(rows(embed(http)), np.float32)
        np.testing.assert_array_equal(given, quantize_embeddings(floats, name))


@pytest.mark.parametrize("role", ["query", "document"])
def test_tasks_have_the_model_s_prompts(kinds: Kinds, kinds_address: str, role: str) -> None:
    with Embedder(kinds.server.grpc_address, "prompted") as embedder:
        expected = embedder.embed(TEXTS, input_type=role).vectors
    task = f"retrieval.{role.replace('document', 'passage')}"
    with httpx.Client(base_url=kinds_address) as http:
        answer = embed(http, model="prompted", task=task)
    np.testing.assert_allclose(rows(answer), expected, atol=1e-5)


def test_vectors_have_length_1_if_wanted(http: httpx.Client, kinds_address: str) -> None:
    """Vectors that have it already have no other length."""
    with httpx.Client(base_url=kinds_address) as other:
        as_given = np.array(rows(embed(other, model="unscaled", normalized=False)))
        unit = np.array(rows(embed(other, model="unscaled", normalized=True)))
    lengths = np.linalg.norm(as_given, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).all()
    np.testing.assert_allclose(unit, as_given / lengths, atol=1e-5)
    assert embed(http, normalized=True).is_success
    refused = embed(http, normalized=False)
    assert refused.status_code == 422
    assert "have length 1" in refused.json()["error"]["message"]


def test_a_long_text_is_cut_off_if_it_may_be(http: httpx.Client) -> None:
    assert embed(http, [LONG], truncate=True).headers["halimede-truncated"] == "1"
    refused = embed(http, [LONG], truncate=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "input_too_long")


def test_late_chunking_is_refused(http: httpx.Client) -> None:
    assert embed(http, late_chunking=False).is_success
    refused = embed(http, late_chunking=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "late_chunking")
