"""Faults around a server under load: no answer is wrong, and the server recovers or says what to
do. docs/guides/failures.md has the table.

Of the client alone: Redis that is killed and a disk that is full are in test_cache.py, and a chain
that goes on while Triton is killed is in test_chain.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from conftest import (
    MODEL,
    POISON,
    free_options,
    own_bytes,
    resident_bytes,
    version_folder,
    wait_until,
)
from test_serve import read_until, start
from tritonclient.utils import InferenceServerException

from halimede import Embedder
from halimede_ops import vectors
from halimede_ops.errors import NonFiniteVector, OutOfMemory, ServerError
from halimede_tools.serve import programs, wheel
from halimede_tools.settings import Settings

TEXTS = [f"text number {index}" + " word" * (index % 40) for index in range(40)]
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@contextlib.contextmanager
def served(*mounts: str, **environment: str) -> Iterator[tuple[subprocess.Popen, wheel.Options]]:
    """`halimede serve`, with file systems of its own mounted for it alone, as `path=size`."""
    options = free_options()
    within = []
    if mounts:
        made = [f"mount -t tmpfs -o size={m.split('=')[1]} t {m.split('=')[0]}" for m in mounts]
        script = " && ".join([*made, 'exec "$@"'])
        within = ["unshare", "--mount", "sh", "-c", script, "sh"]
    process = start(options, within=within, **environment)
    try:
        yield process, options
    finally:
        process.terminate()
        process.wait(60)


def fill(process: subprocess.Popen, folder: str) -> None:
    """Fill the file system of a folder, in the mount namespace of the process."""
    command = ["nsenter", "--mount", f"--target={process.pid}", "sh", "-c"]
    subprocess.run([*command, f"cat /dev/zero > {folder}/full"], stderr=subprocess.DEVNULL)


class Load:
    """Callers that embed until stopped, and check each answer."""

    def __init__(self, address: str, expected: np.ndarray, callers: int = 8) -> None:
        self.outcomes: list[tuple[float, str]] = []
        """Time and outcome: `right`, `wrong`, or the class of a temporary error."""
        self.messages: Counter[str] = Counter()
        self._address, self._expected = address, expected
        self._stopped = threading.Event()
        self._callers = [
            threading.Thread(target=self._call, args=(number,), daemon=True)
            for number in range(callers)
        ]
        for caller in self._callers:
            caller.start()

    def stop(self) -> Counter[str]:
        """Stop the callers; return the number of each outcome."""
        self._stopped.set()
        for caller in self._callers:
            caller.join()
        return Counter(what for _, what in self.outcomes)

    def wait_for_answers(self, timeout_s: float) -> float:
        """Seconds until the next right answer."""
        began = time.monotonic()
        wait_until(
            lambda: any(what == "right" and at > began for at, what in list(self.outcomes)),
            timeout_s,
        )
        return time.monotonic() - began

    def _call(self, number: int) -> None:
        config = {"provider": "triton", "model_id": MODEL, "url": self._address, "timeout": 30}
        with Embedder(config={"models": {"server": {**config, "retries": 0}}}) as embedder:
            while not self._stopped.is_set():
                rows = [(number * 7 + step) % len(TEXTS) for step in range(5)]
                number += 1
                self._outcome(embedder, rows)

    def _outcome(self, embedder: Embedder, rows: list[int]) -> None:
        try:
            found = embedder.embed([TEXTS[row] for row in rows]).vectors
            alike = vectors.cosine(found, self._expected[rows]).min() >= 0.9999
            outcome = "right" if alike else "wrong"
        except ServerError as error:
            outcome = type(error).__name__
            self.messages[str(error)] += 1
            time.sleep(0.05)
        self.outcomes.append((time.monotonic(), outcome))


@pytest.fixture(scope="module")
def right(server: wheel.Server) -> np.ndarray:
    """The vectors of TEXTS."""
    with Embedder(server.grpc_address) as embedder:
        return embedder.embed(TEXTS).vectors


def test_serve_starts_again_what_was_killed(right: np.ndarray) -> None:
    """SIGKILL of a backend's process, then of Triton: callers get right answers or temporary errors,
    and the server restarts both times.
    """
    with served() as (process, options):
        read_until(process, "Ctrl-C")
        load = Load(f"127.0.0.1:{options.grpc_port}", right)
        for name in ("triton_python_backend_stub", "tritonserver"):
            load.wait_for_answers(60)
            family = psutil.Process(process.pid).children(recursive=True)
            next(one for one in family if name.startswith(one.name())).kill()
            printed = read_until(process, "it is started again")
            back_s = load.wait_for_answers(180)
            print(f"{name}: back after {back_s:.1f} s")
            read_until(process, "Ctrl-C")
            assert ("Python backend died" in printed) == (name != "tritonserver")
        outcomes = load.stop()
        print(outcomes, load.messages)
    assert set(outcomes) <= {"right", "ServerUnreachable", "DeadlineExceeded"}


@is_root
def test_too_little_shared_memory_is_said(right: np.ndarray) -> None:
    """With 2 MB of /dev/shm, a request that fits is answered; a larger one raises OutOfMemory."""
    with served("/dev/shm=2m") as (process, options):
        read_until(process, "Ctrl-C")
        address = f"127.0.0.1:{options.grpc_port}"
        load = Load(address, right, callers=4)
        with Embedder(address) as embedder:
            for _ in range(3):
                with pytest.raises(OutOfMemory, match="larger /dev/shm"):
                    embedder.embed("word " * 400_000)
        load.wait_for_answers(60)
        outcomes = load.stop()
        print(outcomes, load.messages)
    assert outcomes["wrong"] == 0


@is_root
def test_shared_memory_that_something_else_fills(right: np.ndarray) -> None:
    """No answer is wrong, and the server recovers when there is space again."""
    with served("/dev/shm=8m") as (process, options):
        read_until(process, "Ctrl-C")
        load = Load(f"127.0.0.1:{options.grpc_port}", right)
        load.wait_for_answers(60)
        fill(process, "/dev/shm")
        time.sleep(3)
        subprocess.run(
            ["nsenter", "--mount", f"--target={process.pid}", "rm", "/dev/shm/full"], check=True
        )
        load.wait_for_answers(180)
        outcomes = load.stop()
        print(outcomes, load.messages)
    assert outcomes["wrong"] == 0


@is_root
def test_a_full_disk(right: np.ndarray, settings: Settings, tmp_path: Path) -> None:
    """A running server keeps answering; a new server says what to do."""
    repository = {"HALIMEDE_REPOSITORY": str(settings.repository)}
    home = {"HALIMEDE_HOME": str(tmp_path), **repository}
    with served(f"{tmp_path}=8m", **home) as (process, options):
        read_until(process, "Ctrl-C")
        load = Load(f"127.0.0.1:{options.grpc_port}", right)
        fill(process, str(tmp_path))
        time.sleep(2)
        load.wait_for_answers(60)
        assert set(load.stop()) == {"right"}
    with served(f"{tmp_path}=16k", **home) as (process, _):
        _, printed = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "No space left on device. Free space there, or set HALIMEDE_HOME" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_changed_byte_is_not_served(settings: Settings, tmp_path: Path, file: str) -> None:
    """A model with one changed bit in the weights or the tokenizer does not load. One line names the
    file and says what to do.
    """
    damaged = tmp_path / "repository"
    shutil.copytree(settings.repository, damaged)
    step = "tokenizer" if file == "tokenizer.json" else "onnx"
    path = version_folder(damaged / f"{MODEL}-{step}") / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    process = start(free_options(), HALIMEDE_REPOSITORY=str(damaged))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert printed.startswith(f"error: model {MODEL} did not load: {file} is not what was built")
    assert "build the model again" in printed


@pytest.mark.parametrize("steps", [False, True], ids=["one process", "steps"])
def test_a_vector_that_is_not_finite_is_an_error(
    poisoned: Path,
    settings: Settings,
    tmp_path: Path,
    right: np.ndarray,
    steps: bool,
) -> None:
    """A text for which the model gives NaN ends in a typed error, however often it is sent. Texts
    that run beside it, in one packed row, get the vectors that they always get.
    """
    options = free_options(models=(MODEL,), steps=steps, response_cache_mb=0 if steps else 1)
    bad = f"text number {POISON}"
    with (
        wheel.serve(poisoned, settings.python_backend, tmp_path, options) as server,
        Embedder(server.grpc_address) as embedder,
    ):
        for row in (0, 1, 20):
            with pytest.raises(NonFiniteVector, match=f"^input {row} has no vector") as raised:
                embedder.embed([*TEXTS[:row], bad, *TEXTS[row:]])
            assert raised.value.index == row
        outcomes: dict[int, Any] = {}
        with grpcclient.InferenceServerClient(server.grpc_address) as client:
            for number in range(120):
                text = bad if number % 3 == 0 else TEXTS[number % len(TEXTS)]
                tensor = grpcclient.InferInput("TEXT", [1, 1], "BYTES")
                tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))

                def answered(result: Any, error: Any, number: int = number) -> None:
                    outcomes[number] = error or result.as_numpy("EMBEDDING")[0]

                client.async_infer(MODEL, [tensor], answered)
            wait_until(lambda: len(outcomes) == 120)
    for number, outcome in outcomes.items():
        if number % 3 == 0:
            assert "NonFiniteVector: input 0 has no vector" in str(outcome)
            assert outcome.status() == "StatusCode.INTERNAL"
        else:
            assert np.dot(outcome, right[number % len(TEXTS)]) >= 0.99999


def test_clients_that_never_read(server: wheel.Server, right: np.ndarray) -> None:
    """Twenty clients send requests and read no answer: other clients are served, and the server's
    memory stays bounded.
    """
    body = (
        b'{"inputs":[{"name":"TEXT","datatype":"BYTES","shape":[64,1],"data":['
        + b",".join([b'"hello"'] * 64)
        + b"]}]}"
    )
    head = (
        f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with contextlib.ExitStack() as opened:
        load = Load(server.grpc_address, right, callers=2)
        load.wait_for_answers(60)
        before = resident_bytes(server.process.pid)
        for _ in range(20):
            client = opened.enter_context(
                socket.create_connection(("127.0.0.1", server.options.http_port))
            )
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.send(head.encode() + body)
        for _ in range(3):
            load.wait_for_answers(40)
        during = resident_bytes(server.process.pid)
    load.wait_for_answers(30)
    outcomes = load.stop()
    assert set(outcomes) <= {"right", "ServerOverloaded"}
    assert outcomes["right"] > 0
    print(f"{before:,} bytes before, {during:,} during; {outcomes}")
    assert during < before + 200 * 2**20


def test_texts_of_4_mb_beside_short_ones(server: wheel.Server, right: np.ndarray) -> None:
    """Callers with texts of 4 MB, some of which give up: every short text is answered, what is too
    much is refused with a typed error, and the memory stays bounded and is returned.
    """
    url = server.grpc_address
    stopped, refused = threading.Event(), Counter[str]()

    def send(text: str, texts: int, timeout_s: float) -> None:
        with grpcclient.InferenceServerClient(url) as client:
            values = np.array([[text.encode()]] * texts, np.object_)
            tensor = grpcclient.InferInput("TEXT", [texts, 1], "BYTES")
            tensor.set_data_from_numpy(values)
            while not stopped.is_set():
                try:
                    client.infer(MODEL, [tensor], client_timeout=timeout_s)
                except InferenceServerException as error:
                    refused[str(error)[:80]] += 1
                    time.sleep(0.1)

    large = [("word " * 800_000, 2, 60.0), ("a" * 4_000_000, 2, 0.3), ("b " * 2_000_000, 8, 60.0)]
    load = Load(url, right, callers=2)
    load.wait_for_answers(60)
    before = own_bytes(server.process.pid)
    callers = [threading.Thread(target=send, args=each) for each in large * 2]
    for caller in callers:
        caller.start()
    during = 0
    for _ in range(20):
        load.wait_for_answers(20)
        during = max(during, own_bytes(server.process.pid))
        time.sleep(0.2)
    stopped.set()
    for caller in callers:
        caller.join()
    outcomes = load.stop()
    time.sleep(2)
    after = own_bytes(server.process.pid)
    print(f"{before:,} bytes before, {during:,} during, {after:,} after; {outcomes}; {refused}")
    assert set(outcomes) == {"right"}
    assert any("8 texts have 32,000,000" in message for message in refused)
    assert during < before + 1200 * 2**20
    assert after < before + 500 * 2**20


@pytest.mark.needs("faketime")
def test_a_clock_that_jumps(
    right: np.ndarray, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps a day forward, then two days back, under load: every answer is right."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    # For Triton and its backends only: libfaketime breaks `sleep` in a Python launcher.
    for name, value in {
        "LD_PRELOAD": str(programs.FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_CACHE_DURATION": "1",
    }.items():
        monkeypatch.setenv(name, value)
    options = free_options(models=(MODEL,))
    with wheel.serve(settings.repository, settings.python_backend, tmp_path, options) as server:
        load = Load(server.grpc_address, right)
        load.wait_for_answers(60)
        for jump in ("+1d", "-1d"):
            clock.write_text(jump)
            time.sleep(2)
            load.wait_for_answers(30)
        outcomes = load.stop()
    assert set(outcomes) == {"right"}


@pytest.mark.faults
def test_a_minute_of_ten_times_the_load(server: wheel.Server, right: np.ndarray) -> None:
    """Ten times the usual callers for a minute: every answer is right or a quick refusal, and the
    server then answers as before.
    """
    calm = Load(server.grpc_address, right, callers=8)
    time.sleep(10)
    calm_rate = calm.stop()["right"] / 10
    began = time.monotonic()
    load = Load(server.grpc_address, right, callers=80)
    time.sleep(60)
    outcomes = load.stop()
    took_s = time.monotonic() - began
    rate = outcomes["right"] / took_s
    print(f"calm {calm_rate:.0f} calls/s; under load {rate:.0f}/s, {outcomes}, {took_s:.0f} s")
    assert set(outcomes) <= {"right", "ServerOverloaded", "DeadlineExceeded"}
    assert took_s < 75
    assert rate > calm_rate / 2
    assert httpx.get(f"http://{server.http_address}/v2/health/ready").status_code == 200
    after = Load(server.grpc_address, right, callers=8)
    after.wait_for_answers(5)
    assert set(after.stop()) == {"right"}
