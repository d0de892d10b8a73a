"""What single providers must hold beyond the contract: errors, secrets, restarts, identity."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import simulations
from conftest import MODEL, NAMES, free_options, version_folder

from halimede import (
    AccessDenied,
    DeadlineExceeded,
    Embedder,
    HalimedeError,
    InvalidInput,
    InvalidModel,
    InvalidText,
    MissingExtra,
    ModelNotFound,
    ServerError,
    ServerOverloaded,
    ServerUnreachable,
)
from halimede.providers import open_providers, options_of
from halimede.providers.sentence_transformers.provider import WORKER
from halimede_engine import session
from halimede_ops import vectors
from halimede_tools.settings import Settings

REMOTE = {
    "openai": {"model_id": "text-embedding-3-small", "path": "/v1"},
    "ollama": {"model_id": "minilm", "path": ""},
    "huggingface": {"model_id": "minilm", "path": ""},
}
SECRET = "sk-very-secret"
TEXT = "xylophone-text"


@pytest.fixture(params=REMOTE)
def remote(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def simulated(remote: str) -> Iterator[simulations.Simulation]:
    with simulations.serve(getattr(simulations, remote)) as running:
        yield running


def config(remote: str, url: str, **options: Any) -> dict[str, Any]:
    facts = REMOTE[remote]
    model = {"provider": remote, "model_id": facts["model_id"], "url": url + facts["path"]}
    return {"models": {"m": {**model, "retries": 0, **options}}}


ERRORS = {
    400: InvalidInput,
    401: AccessDenied,
    403: AccessDenied,
    404: ModelNotFound,
    422: InvalidInput,
    429: ServerOverloaded,
    500: ServerError,
    503: ServerError,
    504: DeadlineExceeded,
}


@pytest.mark.parametrize("status", ERRORS)
def test_statuses_are_typed_errors_without_text_or_key(
    remote: str,
    simulated: simulations.Simulation,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each HTTP status is the class that says what to do; neither key nor text is in it or a log."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    caplog.set_level(logging.DEBUG)
    with Embedder(config=config(remote, simulated.url)) as embedder:
        embedder.embed(TEXT)
        simulated.status = status
        with pytest.raises(ERRORS[status]) as raised:
            embedder.embed(TEXT)
    assert type(raised.value) is ERRORS[status] or status == 503
    chained = repr(raised.value.__cause__) + str(raised.value)
    for leak in (SECRET, TEXT):
        assert leak not in chained
        assert leak not in caplog.text


def test_a_slow_or_absent_server(remote: str, simulated: simulations.Simulation) -> None:
    """A server that is too slow gives DeadlineExceeded, one that is not there ServerUnreachable."""
    with Embedder(config=config(remote, simulated.url, timeout=5)) as embedder:
        embedder.embed("warm")
        simulated.delay_s = 30
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="within 5 s"):
            embedder.embed(TEXT)
        assert time.monotonic() - began < 25
    nowhere = f"http://127.0.0.1:{free_options().http_port}"
    with Embedder(config=config(remote, nowhere)) as embedder:
        with pytest.raises(ServerUnreachable, match=remote):
            embedder.embed(TEXT)


@pytest.mark.parametrize(
    "garbage", [{}, [], "text", {"data": [], "embeddings": [], "models": []}, [[1.0], [1.0, 2.0]]]
)
def test_garbage_is_a_typed_error(
    remote: str, simulated: simulations.Simulation, garbage: Any
) -> None:
    """An answer of another form is one of our errors, never a crash."""
    with Embedder(config=config(remote, simulated.url)) as embedder:
        embedder.embed("warm")
        simulated.garbage = garbage
        with pytest.raises(HalimedeError) as raised:
            embedder.embed([TEXT, "b", "c"])
        assert TEXT not in str(raised.value)


def test_keys_go_to_the_server_and_nowhere_else(
    simulated: simulations.Simulation, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of the environment is sent; a wrong one is AccessDenied; none at all is told."""
    if remote == "ollama":
        pytest.skip("ollama has no keys")
    simulated.key = SECRET
    monkeypatch.setenv("MY_KEY", SECRET)
    with Embedder(config=config(remote, simulated.url, api_key_env="MY_KEY")) as embedder:
        assert len(embedder.embed("a")) == 1
        assert SECRET not in json.dumps(embedder.stats())
        assert SECRET not in repr(embedder.config)
    monkeypatch.setenv("MY_KEY", "wrong")
    with Embedder(config=config(remote, simulated.url, api_key_env="MY_KEY")) as embedder:
        with pytest.raises(AccessDenied):
            embedder.embed("a")
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    only = {"models": {"m": {"provider": remote, "model_id": "m"}}}
    with Embedder(config=only) as embedder, pytest.raises(AccessDenied, match="wants a"):
        embedder.embed("a")


@pytest.mark.parametrize(
    ("model", "dims"),
    [
        ("text-embedding-ada-002", 1536),
        ("text-embedding-3-small", 1536),
        ("text-embedding-3-large", 3072),
    ],
)
def test_openai_models_are_known(model: str, dims: int) -> None:
    """Dims and token limit of OpenAI's models are known without asking."""
    with simulations.serve(simulations.openai) as simulated:
        url = simulated.url + "/v1"
        one = {"models": {"m": {"provider": "openai", "model_id": model, "url": url}}}
        with Embedder(config=one) as embedder:
            assert (embedder.model.dims, embedder.model.max_tokens) == (dims, 8191)
            assert simulated.requests == []
            if model.endswith("small"):
                assert embedder.embed("a b c", dimensions=64).tokens.tolist() == [3]
                assert simulated.requests[-1]["dimensions"] == 64


def test_an_ollama_model_pulled_anew_is_another_space() -> None:
    """A changed digest changes the space, and nothing cached of the old one is given."""
    with simulations.serve(simulations.ollama) as simulated:
        cached = {**config("ollama", simulated.url), "cache": {"model_check": 0}}
        with Embedder(config=cached) as embedder:
            before = embedder.embed("a")
            assert before.precision == "f16"
            assert embedder.embed("a").cached.all()
            simulated.digest = "sha256:two"
            after = embedder.embed("a")
            assert after.space != before.space
            assert not after.cached.any()
            simulated.garbage = {"models": []}
            with pytest.raises(ModelNotFound, match="ollama pull"):
                embedder.model  # noqa: B018


def test_a_vector_a_token_is_refused() -> None:
    """A feature extraction model without pooling is told apart from an embedding model."""
    with simulations.serve(simulations.huggingface) as simulated:
        simulated.garbage = [[[1.0, 2.0], [3.0, 4.0]]]
        with Embedder(config=config("huggingface", simulated.url)) as embedder:
            with pytest.raises(InvalidModel, match="a vector a token"):
                embedder.embed("a")


def sentence_transformers(source: Path, **options: Any) -> dict[str, Any]:
    model = {"provider": "sentence_transformers", "model_id": MODEL, "path": str(source)}
    return {"models": {"m": {**model, **options}}}


def workers() -> list[psutil.Process]:
    mine = psutil.Process().children()
    return [process for process in mine if WORKER in command_line(process)]


def command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):  # also one that nobody has waited for
        return process.cmdline()
    return []


def test_the_process_is_started_again_when_it_dies(source: Path) -> None:
    """After SIGKILL of the process the next call works, in the same space; close leaves nothing."""
    with Embedder(config=sentence_transformers(source)) as embedder:
        first = embedder.embed("a")
        [worker] = workers()
        os.kill(worker.pid, signal.SIGKILL)
        second = embedder.embed("a")
        assert vectors.cosine(first.vectors, second.vectors)[0] >= 0.99999
        assert first.space == second.space
        assert first.tokens.tolist() == [3]
        assert len(embedder.embed("word " * 300).tokens) == 1
    assert workers() == []


def test_its_space_is_its_own(source: Path, settings: Settings) -> None:
    """It never claims the space of the built model, though the weights are the same."""
    with Embedder(config=sentence_transformers(source)) as embedder:
        space = embedder.model.space
    spec = json.loads((version_folder(settings.repository / MODEL) / "spec.json").read_text())
    assert space != spec["space"]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """Each local provider tells that its model cannot be opened, without a path of the machine."""
    with Embedder(config=sentence_transformers(tmp_path)) as embedder:
        with pytest.raises(InvalidModel, match="the model failed"):
            embedder.embed("a")
    onnx = {"provider": "onnx", "model_id": "none", "path": str(tmp_path)}
    with Embedder(config={"models": {"m": onnx}}) as embedder:
        with pytest.raises(ModelNotFound, match="make build"):
            embedder.embed("a")


def test_onnx_runs_every_precision_on_every_device_here(
    settings: Settings, texts: list[str], expected: np.ndarray
) -> None:
    """onnxruntime's CPU and OpenVINO both give the model's vectors; CUDA is told to be missing."""
    for precision, bar in (("fp32", 0.9999), ("int8", 0.98)):
        for device in ("cpu", "openvino", "auto"):
            model = {
                "provider": "onnx",
                "model_id": NAMES[precision],
                "path": str(settings.repository),
                "device": device,
                "streams": 1,
            }
            with Embedder(config={"models": {"m": model}}) as embedder:
                result = embedder.embed(texts[:40])
            assert vectors.cosine(result.vectors, expected[:40]).mean() >= bar
            assert result.precision == precision
    with Embedder(config={"models": {"m": {**model, "device": "cuda"}}}) as embedder:
        with pytest.raises(MissingExtra, match="onnxruntime-gpu"):
            embedder.embed("a")


def test_onnx_notices_that_its_files_changed(settings: Settings, tmp_path: Path) -> None:
    """A model written anew under the same name is opened anew."""
    import shutil

    for name in (MODEL, f"{MODEL}-tokenizer", f"{MODEL}-onnx"):
        shutil.copytree(settings.repository / name, tmp_path / name)
    model = {"provider": "onnx", "model_id": MODEL, "path": str(tmp_path)}
    with Embedder(config={"models": {"m": model}, "cache": {"model_check": 0}}) as embedder:
        before = embedder.embed("a")
        for file in ("spec.json", "quality.json"):
            path = version_folder(tmp_path / MODEL) / file
            path.unlink()  # a hard link of the built one
            text = (version_folder(settings.repository / MODEL) / file).read_text()
            path.write_text(text.replace(before.space, "e" * 16))
        assert embedder.embed("a").space == "e" * 16


def threads() -> set[threading.Thread]:
    """All but those that end by themselves when they are idle."""
    kept = ("halimede", "asyncio_")
    return {thread for thread in threading.enumerate() if not thread.name.startswith(kept)}


def test_onnx_runs_together_what_many_callers_ask(
    settings: Settings, texts: list[str], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single texts of 16 threads share runs, and each gets its own vector; a bad one fails alone;
    closed, it leaves no thread.
    """
    runs: list[int] = []
    run_together = session.Session.run_together

    def counted(self: session.Session, rows: Any) -> np.ndarray:
        runs.append(len(rows))
        time.sleep(0.01)  # on any machine texts come meanwhile
        return run_together(self, rows)

    monkeypatch.setattr(session.Session, "run_together", counted)
    before = threads()
    model = {"provider": "onnx", "model_id": MODEL, "path": str(settings.repository)}

    def embed(row: int) -> np.ndarray | type:
        try:
            return embedder.embed([b"\xff"] if row == 7 else texts[row]).vectors[0]
        except HalimedeError as error:
            return type(error)

    with Embedder(config={"models": {"m": model}}) as embedder, ThreadPoolExecutor(16) as callers:
        found = list(callers.map(embed, range(300)))
    assert found.pop(7) is InvalidText
    wanted = np.delete(expected[:300], 7, axis=0)
    assert vectors.cosine(np.stack(found), wanted).min() >= 0.9999
    assert sum(runs) == len(found)
    assert len(runs) < len(found) / 2
    gc.collect()  # the bad text's error refers to the model
    assert threads() <= before


def test_onnx_does_not_keep_a_program_from_its_end(settings: Settings) -> None:
    """A program that never closes its embedder ends."""
    model = {"provider": "onnx", "model_id": MODEL, "path": str(settings.repository)}
    code = (
        "from halimede import Embedder\n"
        f"embedder = Embedder(config={{'models': {{'m': {model!r}}}}})\n"
        "print(embedder.embed('a').vectors.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("(1, 384)\n", "")


def test_a_missing_extra_is_named() -> None:
    """Where a package is not installed, the error names the extra that brings it."""
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from halimede import Embedder, MissingExtra\n"
        "config = {'models': {'m': {'provider': 'openai', 'model_id': 'm', 'url': 'http://x'}}}\n"
        "try:\n"
        "    Embedder(config=config).embed('a')\n"
        "except MissingExtra as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'halimede[openai]'" in done.stdout


def test_providers_are_opened_by_kind() -> None:
    """The registry opens a provider from its options."""
    [hashed] = open_providers(options_of("hash").model_validate({}))
    assert hashed.name == "hash:hash"
    with contextlib.suppress(HalimedeError):
        options_of("nothing")
