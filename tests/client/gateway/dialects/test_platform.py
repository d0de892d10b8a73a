"""The agent platform's dialect.

platform_check.sh is written after the description of the platform's own check: its own is not here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MODEL
from gateways import assert_alike, gateway, triton_model

from halimede_tools.serve import ports, wheel

TEXTS = ["hello world", "What is Triton?"]
CHECK = Path(__file__).with_name("platform_check.sh")


@pytest.mark.needs("curl")
def test_its_check_passes_on_one_port(address: str) -> None:
    command = ["sh", str(CHECK), address, MODEL, "384"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(": ok") == 3


def test_generate(http: httpx.Client, vectors: Any) -> None:
    for model in (MODEL, None):
        body = {"text": TEXTS[0], "model": model, "use_fallback": True}
        answer = http.post("/v1/embeddings/generate", json=body).json()
        assert_alike([answer["embedding"]], vectors(TEXTS[:1]))
        assert (answer["model"], answer["dimensions"]) == (MODEL, 384)
        assert answer["provider"] == "triton"
        assert len(answer["space"]) == 16
    several = http.post("/v1/embeddings/generate", json={"text": TEXTS}).json()
    assert_alike(several["embeddings"], vectors(TEXTS))


def test_encode(http: httpx.Client, vectors: Any) -> None:
    answer = http.post("/encode", json={"texts": TEXTS})
    assert_alike(answer.json()["embeddings"], vectors(TEXTS))
    assert answer.headers["halimede-space"] == answer.json()["space"]


def test_fallback_is_used_unless_forbidden(server: wheel.Server) -> None:
    """The default model's server is down; the fallback is the same model on another server."""
    [port] = ports.free_ports(1)
    down = {"gone": {"provider": "triton", "model_id": MODEL, "url": f"127.0.0.1:{port}"}}
    models = down | triton_model(server)
    with gateway(models, fallback=(MODEL,)) as running, httpx.Client(base_url=running) as http:
        body = {"text": "hello", "model": "gone"}
        assert http.post("/v1/embeddings/generate", json=body).status_code == 200
        answer = http.post("/v1/embeddings/generate", json={**body, "use_fallback": False})
        assert answer.status_code == 503
        assert answer.json()["error"]["message"]


def test_bad_requests_are_refused(http: httpx.Client) -> None:
    for path, body, status in (
        ("/v1/embeddings/generate", {}, 422),
        ("/v1/embeddings/generate", {"text": 1}, 422),
        ("/v1/embeddings/generate", {"text": "a", "model": "nothing"}, 404),
        ("/encode", {"texts": "a"}, 422),
        ("/encode", {}, 422),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
