"""Ollama's dialect, by Ollama's own package."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import ollama
import pytest
from conftest import MODEL
from gateways import assert_alike

TEXTS = ["hello world", "What is Triton?", "a"]
LONG = "The museum opens at nine. " * 200
NULLS = {"num_ctx": None, "temperature": None, "seed": 7}


@pytest.fixture
def client(address: str) -> ollama.Client:
    return ollama.Client(host=address)


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}:latest"])
def test_embed(client: ollama.Client, vectors: Any, name: str) -> None:
    answer = client.embed(name, TEXTS, truncate=True, options=NULLS, keep_alive="5m")
    assert_alike(answer.embeddings, vectors(TEXTS))
    assert answer.model == name
    assert answer.prompt_eval_count > len(TEXTS)
    assert answer.total_duration > 0
    assert answer.load_duration == 0


def test_one_text_and_fewer_dimensions(client: ollama.Client, vectors: Any) -> None:
    answer = client.embed(MODEL, TEXTS[0], dimensions=128)
    expected = vectors(TEXTS[:1])[:, :128]
    assert_alike(answer.embeddings, expected / np.linalg.norm(expected))


def test_asyncio(address: str, vectors: Any) -> None:
    async def embed() -> Any:
        return await ollama.AsyncClient(host=address).embed(MODEL, TEXTS)

    assert_alike(asyncio.run(embed()).embeddings, vectors(TEXTS))


def test_older_embeddings(client: ollama.Client, vectors: Any) -> None:
    answer = client.embeddings(MODEL, TEXTS[0], options=NULLS)
    assert_alike([answer.embedding], vectors(TEXTS[:1]))


def test_nothing_has_no_vector(client: ollama.Client) -> None:
    """As with Ollama, where it only loads the model."""
    assert client.embed(MODEL, "").embeddings == []
    assert client.embed(MODEL, []).embeddings == []
    assert client.embeddings(MODEL, "").embedding == []


def test_a_long_text_is_cut_off_or_refused(client: ollama.Client, http: httpx.Client) -> None:
    body = {"model": MODEL, "input": ["short", LONG]}
    assert http.post("/api/embed", json=body).headers["halimede-truncated"] == "1"
    with pytest.raises(ollama.ResponseError, match=r"input 1 has [\d,]+ tokens") as raised:
        client.embed(MODEL, ["short", LONG], truncate=False)
    assert raised.value.status_code == 400


def test_models(client: ollama.Client, http: httpx.Client) -> None:
    """Every model has a name with a tag, and a digest that its space and precision decide."""
    models = {model.model: model for model in client.list().models}
    assert {f"{MODEL}:latest", f"{MODEL}-int8:latest"} <= models.keys()
    digests = {model.digest for model in models.values()}
    assert len(digests) == len(models)
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)
    again = {model.model: model.digest for model in client.list().models}
    assert again == {name: model.digest for name, model in models.items()}
    shown = client.show(f"{MODEL}:latest")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo["halimede.embedding_length"] == 384
    assert shown.details.quantization_level == "FP32"
    assert http.post("/api/show", json={"name": MODEL}).status_code == 200
    assert http.get("/api/version").json()["version"].count(".") == 2


def test_errors_are_in_ollamas_shape(client: ollama.Client, http: httpx.Client) -> None:
    for ask in (client.embed, client.embeddings, client.show):
        with pytest.raises(ollama.ResponseError, match="no model of this name") as raised:
            ask("nothing")
        assert raised.value.status_code == 404
    for body, status in (
        ({"input": "a"}, 422),
        ({"model": MODEL, "input": [1]}, 422),
        ({"model": MODEL, "input": "a", "dimensions": 0}, 422),
        ({"model": MODEL, "input": "a", "dimensions": 9999}, 400),
    ):
        answer = http.post("/api/embed", json=body)
        assert (answer.status_code, type(answer.json()["error"])) == (status, str)
