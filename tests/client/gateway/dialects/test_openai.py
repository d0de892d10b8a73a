"""OpenAI's dialect, by OpenAI's own SDK."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import MODEL
from gateways import assert_alike, gateway, triton_model

from halimede_tools.serve import ports, wheel

TEXTS = ["hello world", "What is Triton?", "a", "", "An ocelot sleeps in the rain. " * 3]
LONG = "The museum opens at nine. " * 200
MANY = 2048
"""Inputs of the largest request that OpenAI takes."""


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_vectors_are_those_of_sentence_transformers(
    client: openai.OpenAI, vectors: Any, encoding: Any
) -> None:
    given = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(input=TEXTS, model=MODEL, **given)
    rows = [row.embedding for row in answer.data]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert_alike(rows, vectors(TEXTS))
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    assert answer.usage.total_tokens > len(TEXTS)


def test_asyncio(address: str, vectors: Any) -> None:
    async def embed() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
            calls = [client.embeddings.create(input=[text], model=MODEL) for text in TEXTS]
            return await asyncio.gather(*calls)

    answers = asyncio.run(embed())
    assert_alike([answer.data[0].embedding for answer in answers], vectors(TEXTS))


def test_the_largest_request(client: openai.OpenAI, vectors: Any) -> None:
    """Its rows are in the order of its texts; one text more is refused."""
    texts = [f"number {n}" for n in range(MANY)]
    answer = client.embeddings.create(input=texts, model=MODEL)
    assert [row.index for row in answer.data] == list(range(MANY))
    some = [0, 1, 777, MANY - 1]
    assert_alike([answer.data[n].embedding for n in some], vectors([texts[n] for n in some]))
    with pytest.raises(openai.APIStatusError, match="2,049 inputs") as raised:
        client.embeddings.create(input=[*texts, "one more"], model=MODEL)
    assert raised.value.status_code == 413


def test_fewer_dimensions(client: openai.OpenAI, vectors: Any) -> None:
    answer = client.embeddings.create(input=TEXTS, model=MODEL, dimensions=128)
    expected = vectors(TEXTS)[:, :128]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_alike([row.embedding for row in answer.data], expected)
    with pytest.raises(openai.BadRequestError, match="385"):
        client.embeddings.create(input=TEXTS, model=MODEL, dimensions=385)


def test_further_fields(client: openai.OpenAI, http: httpx.Client, vectors: Any) -> None:
    """NIM's and Jina's fields, unknown ones, and nulls."""
    for extra in (
        {"input_type": "query", "truncate": "END"},
        {"input_type": "passage", "truncate": "NONE"},
        {"task": "retrieval.query", "late_chunking": False},
        {"task": "classification"},
        {"modality": ["text"], "something": {"else": None}},
    ):
        answer = client.embeddings.create(
            input=TEXTS, model=MODEL, encoding_format="float", user="somebody", extra_body=extra
        )
        assert_alike([row.embedding for row in answer.data], vectors(TEXTS))
    nulls = dict.fromkeys(("encoding_format", "dimensions", "user", "truncate", "input_type"))
    assert http.post("/v1/embeddings", json={"input": "a", "model": MODEL, **nulls}).is_success


def test_what_was_cut_off_is_told_or_refused(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response
    headers = raw.create(input=["short", LONG], model=MODEL).headers
    assert headers["halimede-truncated"] == "1"
    assert headers["halimede-precision"] == "fp32"
    assert headers["halimede-provider"] == "triton"
    assert headers["halimede-cached"] == "0"
    assert len(headers["halimede-space"]) == 16
    for truncate in ("NONE", "START"):
        with pytest.raises(openai.BadRequestError, match="input 1 has") as raised:
            client.embeddings.create(
                input=["short", LONG], model=MODEL, extra_body={"truncate": truncate}
            )
        assert raised.value.code == "input_too_long"


def test_models(client: openai.OpenAI) -> None:
    assert {MODEL, f"{MODEL}-int8"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="Did you mean") as raised:
        client.models.retrieve(MODEL[:-1])
    assert raised.value.code == "model_not_found"


def test_aliases(server: wheel.Server, vectors: Any) -> None:
    """The body names the alias, as the caller expects, and a header the true model."""
    aliases = {"text-embedding-3-small": MODEL}
    with gateway(triton_model(server), aliases=aliases) as running:
        client = openai.OpenAI(base_url=f"{running}/v1", api_key="any")
        raw = client.embeddings.with_raw_response.create(
            input=TEXTS, model="text-embedding-3-small"
        )
        assert raw.headers["halimede-model"] == MODEL
        answer = raw.parse()
        assert answer.model == "text-embedding-3-small"
        assert_alike([row.embedding for row in answer.data], vectors(TEXTS))


def test_token_ids_are_refused(client: openai.OpenAI) -> None:
    for ids in ([1, 2], [[1, 2], [3]]):
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length") as raised:
            client.embeddings.create(input=ids, model=MODEL)
        assert raised.value.param == "input"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": MODEL}, 422, "input"),
        ({"model": MODEL, "input": None}, 422, "input"),
        ({"model": MODEL, "input": ""}, 400, "input"),
        ({"model": MODEL, "input": []}, 400, "input"),
        ({"model": MODEL, "input": {"a": 1}}, 422, "input"),
        ({"model": MODEL, "input": ["a", 1]}, 422, "input"),
        ({"model": MODEL, "input": [["a"]]}, 422, "input"),
        ({"model": MODEL, "input": [[]]}, 400, "input"),
        ({"input": "a"}, 422, "model"),
        ({"model": 1, "input": "a"}, 422, "model"),
        ({"model": MODEL, "input": "a", "encoding_format": "hex"}, 422, "encoding_format"),
        ({"model": MODEL, "input": "a", "dimensions": -1}, 422, "dimensions"),
        ({"model": MODEL, "input": "a", "truncate": "MIDDLE"}, 422, "truncate"),
        ({"model": MODEL, "input": "a", "late_chunking": True}, 400, "late_chunking"),
        ({"model": "nothing", "input": "a"}, 404, None),
    ],
)
def test_bad_requests_have_openais_shape(
    http: httpx.Client, body: Any, status: int, param: str | None
) -> None:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


def test_no_json(http: httpx.Client) -> None:
    lone = b'{"model": "all-MiniLM-L6-v2", "input": "\\ud800"}'  # half of a pair
    for body in (b"", b"{", b"\xff", b"[" * 100_000, lone):
        answer = http.post("/v1/embeddings", content=body)
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["message"]


def test_a_server_that_is_down_is_to_be_asked_again() -> None:
    [port] = ports.free_ports(1)
    models = {MODEL: {"provider": "triton", "model_id": MODEL, "url": f"127.0.0.1:{port}"}}
    with gateway(models) as running:
        client = openai.OpenAI(base_url=f"{running}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.InternalServerError) as raised:
            client.embeddings.create(input="a", model=MODEL)
        assert raised.value.status_code == 503
        assert raised.value.response.headers["retry-after"] == "1"
