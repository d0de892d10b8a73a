"""What goes wrong at remote providers, with the official SDKs over real HTTP."""

from __future__ import annotations

import email.utils
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import simulations

from halimede import (
    Embedder,
    HalimedeError,
    InvalidInput,
    ServerError,
)
from halimede.providers.http_errors import from_status, retry_after_s
from halimede.providers.proxies import is_loopback, proxy_for
from halimede_tools.serve import ports

PATHS = {"openai": "/v1", "ollama": "", "huggingface": ""}
MODELS = {"openai": "text-embedding-3-small", "ollama": "minilm", "huggingface": "minilm"}
PAGE = b"<html><body>s3cret words of a gateway</body></html>"
LASTING = {501, 505, 506, 510, 511}
RETRYABLE = {408, 409, 423, 425, 429, 504, 524, 529}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(params=PATHS)
def remote(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def simulated(remote: str) -> Iterator[simulations.Simulation]:
    with simulations.serve(getattr(simulations, remote)) as running:
        yield running


def opened(remote: str, url: str, **options: Any) -> Embedder:
    model = {"provider": remote, "model_id": MODELS[remote], "url": url + PATHS[remote]}
    return Embedder(config={"models": {"m": {**model, "retries": 0, "timeout": 20, **options}}})


def failure(embedder: Embedder, texts: Any = "xylophone") -> HalimedeError:
    with pytest.raises(HalimedeError) as raised:
        embedder.embed(texts)
    message = str(raised.value)
    assert not any(leak in message for leak in ("s3cret", "<", "\n", "xylophone"))
    return raised.value


@pytest.mark.parametrize("status", [*range(100, 200), *range(201, 600)])
def test_every_status_is_typed(status: int) -> None:
    """A class of ours, retryable exactly where the same request can succeed later."""
    error = from_status("p", status, {"Retry-After": "3"})
    assert error.retryable == (status in RETRYABLE or 500 <= status not in LASTING), error
    assert isinstance(error, ServerError) == error.retryable
    assert error.retry_after_s == (3 if error.retryable else None)


@pytest.mark.parametrize("status", [400, 403, 405, 407, 413, 429, 500, 502, 503, 504])
def test_a_gateways_page_is_never_shown(
    remote: str, simulated: simulations.Simulation, status: int
) -> None:
    """Of an HTML page only the status is told; `Retry-After` is in the error."""
    with opened(remote, simulated.url) as embedder:
        embedder.embed("warm")
        simulated.status, simulated.raw = status, PAGE
        simulated.headers = {"Retry-After": "7"}
        error = failure(embedder)
    expected = from_status("p", status)
    assert type(error) is type(expected)
    assert error.retry_after_s == (7 if error.retryable else None)
    assert str(status) in str(error)


@pytest.mark.parametrize("body", [PAGE, b"", b"{}", b"[]", b"null", b'{"data": [', b"\xff\xfe"])
def test_a_200_that_is_not_ours_is_said_to_be_none(
    remote: str, simulated: simulations.Simulation, body: bytes
) -> None:
    """A login page, an empty or broken body, another service's JSON: an error in words."""
    with opened(remote, simulated.url) as embedder:
        embedder.embed("warm")
        simulated.raw = body
        assert type(failure(embedder)) in (HalimedeError, ServerError)


def test_overload_ends_after_the_pause_asked_for(
    remote: str, simulated: simulations.Simulation
) -> None:
    """A 429 with `Retry-After: 1` is sent again after a second, and answered."""
    with opened(remote, simulated.url, retries=1) as embedder:
        embedder.embed("warm")
        simulated.status, simulated.headers = 429, {"Retry-After": "1"}
        threading.Timer(0.5, setattr, [simulated, "status", 200]).start()
        began_s = time.monotonic()
        assert embedder.embed("a").dims
        assert time.monotonic() - began_s >= 1


def test_retry_after_is_read() -> None:
    """Seconds or a date; what is neither is none."""
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert retry_after_s({"Retry-After": "12"}) == 12
    assert 90 < (retry_after_s({"Retry-After": later}) or 0) <= 100
    assert retry_after_s({"Retry-After": email.utils.formatdate(0, usegmt=True)}) == 0
    for nonsense in ("", "-5", "soon", "1e9999", "99 99", "\u0663"):
        assert retry_after_s({"Retry-After": nonsense}) in (None, 3)
    assert retry_after_s({}) is None


def test_loopback_is_never_proxied(
    remote: str, simulated: simulations.Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dead proxy in the environment, this machine's servers are reached."""
    [dead] = ports.free_ports(1)
    for name in PROXIES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{dead}")
    with opened(remote, simulated.url) as embedder:
        assert embedder.embed("a").dims


def test_a_proxy_that_fails_is_named(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which proxy was asked, without its password."""
    [dead] = ports.free_ports(1)
    for name in PROXIES:
        monkeypatch.setenv(name, f"http://user:s3cret@127.0.0.1:{dead}")
    with opened(remote, "http://192.0.2.1:8080", timeout=5) as embedder:
        error = failure(embedder)
    assert f"127.0.0.1:{dead}" in str(error), error
    assert error.retryable


def test_which_proxy_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the URL's kind, none for this machine and for no_proxy."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://u:p@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example,.lan")
    assert proxy_for("https://outside.example/v1") == "proxy.example:3128"
    assert proxy_for("http://outside.example/v1") is None
    for url in (
        "https://inside.example",
        "https://host.lan",
        "https://localhost:1",
        "https://[::1]",
    ):
        assert proxy_for(url) is None
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "LOCALHOST", "a.localhost")))
    assert not any(map(is_loopback, ("10.0.0.1", "localhost.example", "")))


@pytest.mark.parametrize(
    "row_values",
    [
        [0.1, None, 0.3],
        [0.1, float("nan")],
        [0.1, float("inf")],
        [0.1, "0.5x"],
        ["0.1", "0.5"],
        [0.1, [1.0]],
        [True, False],
        [0.1, {"a": 1}],
        [],
    ],
    ids=str,
)
def test_a_number_that_is_none_is_an_error(row_values: list[Any]) -> None:
    """`null`, NaN, Infinity, words, truth values and lists never become a vector."""
    with simulations.serve(simulations.openai) as simulated:
        with opened("openai", simulated.url, model_id="other") as embedder:
            embedder.embed("warm")
            row = {"object": "embedding", "index": 0, "embedding": row_values}
            simulated.garbage = {"object": "list", "model": "m", "data": [row]}
            failure(embedder)


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": None}, {"prompt_tokens": 2**40}, "x", 7])
def test_a_count_of_tokens_that_is_none_is_unknown(usage: Any) -> None:
    """The vector is there, the number of tokens is unknown."""
    with simulations.serve(simulations.openai) as simulated:
        with opened("openai", simulated.url, model_id="other") as embedder:
            embedder.embed("warm")
            row = {"object": "embedding", "index": 0, "embedding": [0.5] * 384}
            simulated.garbage = {"object": "list", "model": "m", "data": [row], "usage": usage}
            assert embedder.embed("a").tokens.tolist() == [-1]


def test_the_sdks_own_url_is_part_of_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that `OPENAI_BASE_URL` names have spaces of their own, as those of `url` have."""
    with simulations.serve(simulations.openai) as simulated:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("OPENAI_BASE_URL", simulated.url + "/v1")
        model = {"provider": "openai", "model_id": MODELS["openai"]}
        with Embedder(config={"models": {"m": model}}) as embedder:
            by_environment = embedder.embed("a").space
        with opened("openai", simulated.url) as embedder:
            assert embedder.embed("a").space == by_environment
        monkeypatch.delenv("OPENAI_BASE_URL")
        with Embedder(config={"models": {"m": model}}) as embedder:
            assert embedder.model.space != by_environment


@pytest.mark.parametrize("indices", [[0, 0], [1, 2], [0], [0, 1, 2], [None, 1], ["0", "1"]])
def test_indices_must_be_those_of_the_texts(indices: list[Any]) -> None:
    """Duplicate, missing and further rows of an OpenAI answer are an error, not a mix-up."""
    with simulations.serve(simulations.openai) as simulated:
        with opened("openai", simulated.url, model_id="other") as embedder:
            embedder.embed("warm")
            rows = [{"object": "embedding", "index": i, "embedding": [0.5] * 384} for i in indices]
            simulated.garbage = {"object": "list", "model": "m", "data": rows}
            failure(embedder, ["xylophone", "b"])


def test_a_server_without_base64_is_asked_for_floats() -> None:
    """Once; it is remembered. A request that is wrong for another reason stays refused."""
    with simulations.serve(simulations.openai) as simulated:
        simulated.refuses_base64 = True
        with opened("openai", simulated.url, model_id="other") as embedder:
            embedder.embed("warm")
            simulated.requests.clear()
            assert embedder.embed(["a", "b"]).dims == 384
            assert [one.get("encoding_format") for one in simulated.requests] == ["float"]
            simulated.status = 400
            assert type(failure(embedder)) is InvalidInput


def test_ollamas_text_model_is_described() -> None:
    """Of a model with parts, such as one for images, the text model's length and limit are read."""
    with simulations.serve(simulations.ollama) as simulated:
        simulated.info = {
            "general.architecture": "bert",
            "clip.vision.embedding_length": 1024,
            "vision.embedding_length": 1280,
            "vision.context_length": 7,
        }
        with opened("ollama", simulated.url) as embedder:
            assert (embedder.model.dims, embedder.model.max_tokens) == (384, 256)


def test_truncation_is_unknown_where_tokens_are(
    remote: str, simulated: simulations.Simulation
) -> None:
    """`truncated` is masked, not False, where the provider does not count tokens."""
    with opened(remote, simulated.url) as embedder:
        result = embedder.embed(["a", "b"])
    assert result.tokens.tolist() == [-1, -1]
    assert result.truncated.tolist() == [None, None]


def test_the_programs_own_logging_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The level of the SDK's loggers stays, and its records of our calls hold no text."""
    levels = {name: logging.getLogger(name).level for name in ("openai", "openai._base_client")}
    caplog.set_level(logging.DEBUG)
    with simulations.serve(simulations.openai) as simulated:
        with opened("openai", simulated.url) as embedder:
            embedder.embed("xylophone")
            assert "xylophone" not in caplog.text
            assert {name: logging.getLogger(name).level for name in levels} == levels
        import openai

        caplog.clear()
        own = openai.OpenAI(api_key="k", base_url=simulated.url + "/v1", max_retries=0)
        own.embeddings.create(model="text-embedding-3-small", input=["their own text"])
    assert any(record.name == "openai._base_client" for record in caplog.records)
