"""API keys: who may ask, in each dialect's shape of a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import yaml
from conftest import ROOT
from gateways import gateway

from halimede.config.gateway import GatewayConfig
from halimede.gateway.dialects.dialect import dialect_at
from halimede.gateway.edge.keys import ENVIRONMENT, Keys, sha256
from halimede_ops.errors import InvalidConfig

NOBODY = {"m": {"provider": "triton", "model_id": "m", "url": "127.0.0.1:9"}}
"""A model whose server does not answer."""
FULL, LIMITED = "the key of everything", "the key of one model"


class Shape(NamedTuple):
    """A request of a dialect, and where its errors say what was wrong."""

    path: str
    body: dict[str, Any]
    message: tuple[str, ...]


OF_OPENAI = ("error", "message")
SHAPES = {
    "openai": Shape("/v1/embeddings", {"model": "m", "input": "a text"}, OF_OPENAI),
    "platform": Shape("/encode", {"texts": ["a text"]}, OF_OPENAI),
    "ollama": Shape("/api/embed", {"model": "m", "input": "a text"}, ("error",)),
    "weaviate": Shape("/vectors", {"text": "a text"}, ("error",)),
    "kserve": Shape("/v2/models/m/infer", {"inputs": []}, ("error",)),
    "cohere": Shape(
        "/v2/embed",
        {
            "model": "m",
            "texts": ["a text"],
            "input_type": "search_query",
            "embedding_types": ["float"],
        },
        ("message",),
    ),
    "tei": Shape("/embed", {"inputs": "a text", "model": "m"}, ("error",)),
}


def message(shape: Shape, answer: httpx.Response) -> str:
    """What an error says, read where the dialect has it."""
    found = answer.json()
    for name in shape.message:
        found = found[name]
    assert isinstance(found, str)
    return found


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    given = SHAPES[request.param]
    assert dialect_at(given.path).name == request.param
    return given


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    entries = [
        {"id": "full", "sha256": sha256(FULL.encode())},
        {"id": "limited", "sha256": sha256(LIMITED.encode()), "models": ["other-*"]},
    ]
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture(scope="module")
def guarded(keys_file: Path) -> Iterator[httpx.Client]:
    """A gateway with keys, before a server that does not answer."""
    with (
        gateway(NOBODY, keys=str(keys_file)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def test_a_request_without_a_key_is_refused(guarded: httpx.Client, shape: Shape) -> None:
    """401 in the dialect's shape; it says in which header a key comes."""
    answer = guarded.post(shape.path, json=shape.body)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "missing" in message(shape, answer)
    assert "Authorization" in message(shape, answer)


@pytest.mark.parametrize("wrong", ["", "Bearer", "Bearer wrong", f"Basic {FULL}"])
def test_a_wrong_key_is_refused(guarded: httpx.Client, shape: Shape, wrong: str) -> None:
    answer = guarded.post(shape.path, json=shape.body, headers={"Authorization": wrong})
    assert answer.status_code == 401
    assert "not known" in message(shape, answer)


def test_a_key_of_another_model_is_refused(guarded: httpx.Client, shape: Shape) -> None:
    """403 in the dialect's shape, before the model's server is asked."""
    answer = guarded.post(shape.path, json=shape.body, headers={"x-api-key": LIMITED})
    assert answer.status_code == 403
    assert "limited" in message(shape, answer)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {FULL}"},
        {"authorization": f"bearer  {FULL}"},
        {"x-api-key": FULL},
        {"API-Key": FULL},
        {"Authorization": "Bearer none-of-ours", "x-api-key": FULL},
    ],
)
def test_a_key_comes_in_any_of_three_headers(
    guarded: httpx.Client, headers: dict[str, str]
) -> None:
    """The request goes on to the model's server, which does not answer."""
    shape = SHAPES["openai"]
    assert guarded.post(shape.path, json=shape.body, headers=headers).status_code == 503


def test_openai_raises_its_own_errors(guarded: httpx.Client) -> None:
    url = f"{guarded.base_url}/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong").embeddings.create(model="m", input="a")
    with pytest.raises(openai.PermissionDeniedError):
        openai.OpenAI(base_url=url, api_key=LIMITED).embeddings.create(model="m", input="a")


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/openapi.json"])
def test_probes_need_no_key(guarded: httpx.Client, path: str) -> None:
    assert guarded.get(path).status_code in (200, 503)


def test_what_the_playground_asks_needs_a_key(guarded: httpx.Client) -> None:
    """Its page is open, because it is the same for everybody."""
    assert guarded.get("/").status_code == 200
    assert guarded.get("/playground/api/models").status_code == 401
    assert guarded.get("/playground/../v1/models").status_code == 401
    assert guarded.post("/").status_code == 401


@pytest.mark.parametrize("given", [None, "Bearer anything", "Basic YTpi"])
def test_without_keys_everybody_may_ask(given: str | None, shape: Shape) -> None:
    headers = {} if given is None else {"Authorization": given}
    with gateway(NOBODY) as address:
        answer = httpx.post(address + shape.path, json=shape.body, headers=headers, timeout=60)
    assert answer.status_code == 503


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Separated by commas, without limits, for all models."""
    monkeypatch.setenv(ENVIRONMENT, " first, second ,")
    with gateway(NOBODY) as address, httpx.Client(base_url=address, timeout=60) as client:
        statuses = [
            client.get("/v1/models", headers={"api-key": key}).status_code
            for key in ("first", "second", "", "third")
        ]
    assert statuses == [200, 200, 401, 401]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "no YAML"),
        ("a: 1", "list"),
        ("- text", "list"),
        ("", "list"),
        ("- {id: a}", "sha256"),
        ("- {id: a, sha256: short-secret}", "sha256"),
        ("- {id: 'a b', sha256: '%s'}" % ("0" * 64), "id"),
        ("- {id: a, sha256: '%s', request_per_s: 1}" % ("0" * 64), "requests_per_s"),
        ("- {id: a, sha256: '%s', tokens_per_min: -1}" % ("0" * 64), "tokens_per_min"),
        ("- {id: a, sha256: '%s', models: []}" % ("0" * 64), "models"),
        ("- {id: a, sha256: '%s', 1: 2}" % ("0" * 64), "1"),
        ("- {id: a, sha256: '%s'}\n" % ("0" * 64) * 2, "same id"),
    ],
)
def test_an_invalid_file_is_one_clear_error(tmp_path: Path, content: str, what: str) -> None:
    """It names the entry and the field, and repeats nothing of the file."""
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(InvalidConfig, match=what) as error:
        Keys.read(GatewayConfig(keys=path))
    assert "short-secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_gateway_does_not_start_with_an_invalid_file(tmp_path: Path) -> None:
    """One line on stderr; also with several workers."""
    config = tmp_path / "halimede.yaml"
    config.write_text(yaml.safe_dump({"models": NOBODY, "gateway": {"keys": "/nowhere"}}))
    for workers in ("1", "2"):
        done = halimede("gateway", "--config", str(config), "--workers", workers)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            "error: the file of API keys cannot be read: No such file or directory."
        ]


def test_the_command_makes_a_key_that_works(tmp_path: Path) -> None:
    """The key is on stderr, so that `>> keys.yaml` keeps the entry alone."""
    done = halimede(
        "gateway-key", "search", "--models", "m", "--models", "bge-*", "--tokens-per-day", "10"
    )
    key = done.stderr.split()[-1]
    path = tmp_path / "keys.yaml"
    path.write_text(done.stdout)
    [entry] = yaml.safe_load(done.stdout)
    assert entry == {
        "id": "search",
        "sha256": sha256(key.encode()),
        "models": ["m", "bge-*"],
        "tokens_per_day": 10,
    }
    found = Keys.read(GatewayConfig(keys=path)).find([(b"authorization", f"Bearer {key}".encode())])
    assert found is not None
    assert found.id == "search"


def test_the_command_refuses_a_bad_name() -> None:
    done = halimede("gateway-key", "a name")
    assert (done.returncode, done.stdout) == (1, "")
    assert "id" in done.stderr


def halimede(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "halimede"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
