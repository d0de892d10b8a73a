"""Limits of keys: requests a second, tokens a minute and a day, in memory and in Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from conftest import MODEL, require, wait_until
from gateways import gateway, triton_model
from test_gateway_keys import NOBODY, SHAPES, message

from halimede.gateway.dialects.dialect import dialect_at
from halimede.gateway.edge.keys import sha256
from halimede_tools.bench import redis_server
from halimede_tools.serve import ports, wheel

KEY = "a limited key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
BODY = {"model": MODEL, "input": "An ocelot sleeps in the rain."}


@contextlib.contextmanager
def limited(
    tmp_path: Path, models: dict[str, Any], storage: str = "memory://", **limits: int
) -> Iterator[httpx.Client]:
    """A client of a gateway whose key has these limits."""
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump([{"id": "limited", "sha256": sha256(KEY.encode()), **limits}]))
    options = {"keys": str(path), "limits_storage": storage}
    with (
        gateway(models, **options) as address,
        httpx.Client(base_url=address, headers=HEADERS, timeout=60) as client,
    ):
        yield client


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield "memory://"
        return
    require("redis-server")
    with redis_server.serve(tmp_path) as url:
        yield url


def until_refused(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    """The first answer of 429 among many requests."""
    for _ in range(1000):
        answer = client.post(path, json=body)
        if answer.status_code == 429:
            return answer
    pytest.fail("nothing was refused")


@pytest.mark.parametrize("name", SHAPES)
def test_requests_beyond_the_rate_are_refused(tmp_path: Path, name: str) -> None:
    """429 in the dialect's shape, with the seconds after which to send again; then it goes on."""
    shape = SHAPES[name]
    assert dialect_at(shape.path).name == name
    with limited(tmp_path, NOBODY, requests_per_s=2) as client:
        first = client.post(shape.path, json=shape.body)
        assert first.status_code == 503
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert 0 < float(first.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 1
        assert "x-ratelimit-limit-tokens" not in first.headers
        refused = until_refused(client, shape.path, shape.body)
        assert "2 requests a second" in message(shape, refused)
        assert refused.headers["retry-after"] == "1"
        assert 0 <= int(refused.headers["retry-after-ms"]) <= 1000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        wait_until(lambda: client.post(shape.path, json=shape.body).status_code == 503)


def test_openai_raises_its_own_error(tmp_path: Path) -> None:
    with limited(tmp_path, NOBODY, requests_per_s=1) as client:
        sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.RateLimitError):
            for _ in range(1000):
                with contextlib.suppress(openai.InternalServerError):
                    sdk.embeddings.create(model="m", input="a")


def test_tokens_are_counted_once_they_are_answered(
    server: wheel.Server, tmp_path: Path, storage: str
) -> None:
    """The answer that goes beyond the limit is given; the next is refused, with all its headers."""
    with limited(tmp_path, triton_model(server), storage, tokens_per_min=12) as client:
        first = client.post("/v1/embeddings", json=BODY)
        used = first.json()["usage"]["total_tokens"]
        assert first.headers["x-ratelimit-limit-tokens"] == "12"
        assert first.headers["x-ratelimit-remaining-tokens"] == str(12 - used)
        assert 0 < float(first.headers["x-ratelimit-reset-tokens"].rstrip("s")) <= 60
        assert client.post("/v1/embeddings", json=BODY).status_code == 200
        refused = client.post("/v1/embeddings", json=BODY)
        assert refused.status_code == 429
        assert "12 tokens a minute" in refused.json()["error"]["message"]
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert client.get("/v1/models").status_code == 200


def test_gateways_share_limits_in_redis(server: wheel.Server, tmp_path: Path) -> None:
    """What one has answered is no more left at the other, nor after a restart."""
    require("redis-server")
    models = triton_model(server)
    with redis_server.serve(tmp_path) as url:
        with (
            limited(tmp_path, models, url, tokens_per_day=5) as one,
            limited(tmp_path, models, url, tokens_per_day=5) as other,
        ):
            assert one.post("/v1/embeddings", json=BODY).status_code == 200
            refused = other.post("/v1/embeddings", json=BODY)
            assert refused.status_code == 429
            assert refused.headers["x-should-retry"] == "false"
            assert 0 < int(refused.headers["retry-after"]) <= 24 * 3600
        with limited(tmp_path, models, url, tokens_per_day=5) as again:
            assert again.post("/v1/embeddings", json=BODY).status_code == 429


def test_the_tighter_limit_of_tokens_is_told(server: wheel.Server, tmp_path: Path) -> None:
    with limited(tmp_path, triton_model(server), tokens_per_min=100, tokens_per_day=50) as client:
        answer = client.post("/v1/embeddings", json=BODY)
        assert answer.headers["x-ratelimit-limit-tokens"] == "50"


def test_nobody_is_refused_because_redis_is_gone(server: wheel.Server, tmp_path: Path) -> None:
    """Requests are answered and not counted."""
    [port] = ports.free_ports(1)
    url = f"redis://127.0.0.1:{port}"
    with limited(tmp_path, triton_model(server), url, requests_per_s=1) as client:
        for _ in range(3):
            answer = client.post("/v1/embeddings", json=BODY)
            assert answer.status_code == 200
            assert "x-ratelimit-limit-requests" not in answer.headers


@pytest.mark.parametrize("url", ["", "memory", "ftp://a", "redis://a:port"])
def test_an_unknown_storage_is_one_clear_error(tmp_path: Path, url: str) -> None:
    from halimede_ops.errors import InvalidConfig

    with (
        pytest.raises(InvalidConfig, match="limits_storage"),
        limited(tmp_path, NOBODY, url),
    ):
        pass
