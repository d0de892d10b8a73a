"""The dialect of Weaviate's module text2vec-transformers.

The requests are those of the module's client: its container's source was read, but Weaviate itself
does not run here.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from conftest import MODEL
from gateways import assert_alike, gateway

from halimede_tools.serve import ports

TEXTS = ["hello world", "What is Triton?"]
CONFIG = {"pooling_strategy": "masked_mean", "task_type": "passage"}


@pytest.mark.parametrize("path", ["/vectors", "/vectors/"])
@pytest.mark.parametrize("config", [CONFIG, {"task_type": "query"}, {}, None])
def test_a_text(http: httpx.Client, vectors: Any, path: str, config: Any) -> None:
    sent = {"text": TEXTS[0], "dims": 0, "vector": None, "error": "", "config": config}
    answer = http.post(path, json=sent).json()
    assert_alike([answer["vector"]], vectors(TEXTS[:1]))
    assert (answer["text"], answer["dim"]) == (TEXTS[0], 384)


def test_texts(http: httpx.Client, vectors: Any) -> None:
    answer = http.post("/vectors", json={"texts": TEXTS, "config": CONFIG}).json()
    assert_alike(answer["vectors"], vectors(TEXTS))
    assert answer["dim"] == 384


def test_readiness_and_facts(http: httpx.Client) -> None:
    for path in ("/.well-known/live", "/.well-known/ready"):
        answer = http.get(path)
        assert (answer.status_code, answer.content) == (204, b"")
    assert http.get("/meta").json()["model"]["name"] == MODEL


def test_it_is_alive_but_not_ready_without_a_server() -> None:
    [port] = ports.free_ports(1)
    models = {MODEL: {"provider": "triton", "model_id": MODEL, "url": f"127.0.0.1:{port}"}}
    with gateway(models) as running, httpx.Client(base_url=running) as http:
        assert http.get("/.well-known/live").status_code == 204
        assert http.get("/.well-known/ready").status_code == 503


def test_bad_requests_are_refused(http: httpx.Client) -> None:
    for body in ({}, {"text": 1}, {"text": "a", "texts": ["b"]}, {"texts": "a"}):
        answer = http.post("/vectors", json=body)
        assert (answer.status_code, type(answer.json()["error"])) == (422, str)
