"""NVIDIA's container as halimede_tools/serve/container.py requests it from a Docker engine.

The engine here speaks Docker's wire protocol on a unix socket. Its "Triton" is a real HTTP server
on the port that was published.
"""

from __future__ import annotations

import importlib.metadata
import json
import queue
import re
import shlex
import socket
import socketserver
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import free_options, wait_until

from halimede.models import catalogue
from halimede_ops.errors import ServeError
from halimede_tools.serve import container
from halimede_tools.serve.wheel import Options

ROOT = Path(__file__).resolve().parents[2]
PYTHON_BACKEND = ROOT / "python_backend"
BACKENDS = "/opt/tritonserver/backends"


class ReadyTriton(BaseHTTPRequestHandler):
    """Answers the readiness request only."""

    def do_GET(self) -> None:
        """Answer whether the server is ready."""
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


class RefusalError(Exception):
    """An error answer of the engine."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeContainer:
    """One container of the engine: its create payload, its output, its server."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.payload = payload
        self.output: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.status = "created"
        self.triton: ThreadingHTTPServer | None = None

    def start_triton(self) -> None:
        """Listen where the port of the command's --http-port is published.

        A server that listens on the container's loopback alone is not reached from outside.
        """
        line = self.payload["Cmd"][-1]
        if "--http-address=0.0.0.0" not in line:
            return
        port = re.search(r"--http-port=(\d+)", line)[1]
        (binding,) = self.payload["HostConfig"]["PortBindings"][f"{port}/tcp"]
        address = (binding["HostIp"], int(binding["HostPort"]))
        self.triton = ThreadingHTTPServer(address, ReadyTriton)
        threading.Thread(target=self.triton.serve_forever, daemon=True).start()

    def end(self) -> None:
        """End the process: the server is gone and the output is complete."""
        if self.status != "exited":
            self.status = "exited"
            if self.triton:
                self.triton.shutdown()
                self.triton.server_close()
            self.output.put(None)


class Engine(socketserver.ThreadingUnixStreamServer):
    """The part of Docker's engine that the SDK uses here."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), Handler)
        self.images = {container.IMAGE}
        self.runtimes = ["runc"]
        self.run: Callable[[FakeContainer], None] = FakeContainer.start_triton
        """Runs when a container is started."""
        self.containers: dict[str, FakeContainer] = {}
        """Containers that are not removed."""
        self.payloads: list[dict[str, Any]] = []
        self.calls: list[str] = []

    def end(self, name: str) -> None:
        """End a container; remove it if it has auto-remove."""
        found = self.find(name)
        found.end()
        if found.payload["HostConfig"]["AutoRemove"]:
            self.containers.pop(name, None)

    def find(self, name: str) -> FakeContainer:
        """A container that is not removed."""
        if name not in self.containers:
            raise RefusalError(404, f"No such container: {name}")
        return self.containers[name]

    def create(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Create a container of an image that the engine has."""
        self.payloads.append(payload)
        if payload["Image"] not in self.images:
            raise RefusalError(404, f"No such image: {payload['Image']}")
        name = f"{len(self.payloads):064x}"
        self.containers[name] = FakeContainer(payload)
        return {"Id": name, "Warnings": []}

    def start(self, name: str) -> None:
        """Run a container."""
        found = self.find(name)
        found.status = "running"
        self.run(found)
        if found.status == "exited":
            self.end(name)

    def remove(self, name: str) -> None:
        """Kill a container and forget it."""
        self.find(name).end()
        self.containers.pop(name, None)

    def inspect(self, name: str) -> dict[str, Any]:
        """The fields of a container that the SDK reads."""
        found = self.find(name)
        return {"Id": name, "Config": {"Tty": False}, "State": {"Status": found.status}}


class Handler(BaseHTTPRequestHandler):
    """The engine's endpoints, without their version."""

    protocol_version = "HTTP/1.1"
    server: Engine

    def do_GET(self) -> None:
        """Answer GET."""
        self._answer()

    def do_POST(self) -> None:
        """Answer POST."""
        self._answer()

    def do_DELETE(self) -> None:
        """Answer DELETE."""
        self._answer()

    def _answer(self) -> None:
        path = re.sub(r"^/v[\d.]+|\?.*$", "", self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        name = (re.findall(r"^/containers/([^/]+)", path) or [""])[0]
        call = f"{self.command} {path.replace(name, 'ID') if name not in ('', 'create') else path}"
        self.server.calls.append(call)
        try:
            self._route(call, name, body)
        except RefusalError as refusal:
            self._send(refusal.status, {"message": str(refusal)})

    def _route(self, call: str, name: str, body: dict[str, Any]) -> None:
        engine = self.server
        match call:
            case "GET /version":
                self._send(200, {"ApiVersion": "1.47", "MinAPIVersion": "1.24"})
            case "GET /info":
                self._send(200, {"Runtimes": {name: {} for name in engine.runtimes}})
            case "POST /containers/create":
                self._send(201, engine.create(body))
            case "GET /containers/ID/json":
                self._send(200, engine.inspect(name))
            case "POST /containers/ID/attach":
                self._stream(engine.find(name).output)
            case "POST /containers/ID/start":
                engine.start(name)
                self._send(204)
            case "POST /containers/ID/stop":
                engine.end(name)
                self._send(204)
            case "DELETE /containers/ID":
                engine.remove(name)
                self._send(204)
            case _:
                raise RefusalError(501, f"not part of this engine: {call}")

    def _stream(self, output: queue.SimpleQueue[bytes | None]) -> None:
        """Docker's raw stream: frames of stream number, length, bytes; until the container ends."""
        self.close_connection = True
        self.wfile.write(
            b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n"
            b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        )
        while (chunk := output.get()) is not None:
            self.wfile.write(struct.pack(">BxxxL", 2, len(chunk)) + chunk)

    def _send(self, status: int, body: dict[str, Any] | None = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing: a unix socket has no client address."""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    path = tmp_path / "docker.sock"
    with Engine(path) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        yield running
        for name in list(running.containers):
            running.remove(name)
        running.shutdown()
        thread.join()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A built repository of one model."""
    folder = tmp_path / "models"
    (folder / "minilm" / "1").mkdir(parents=True)
    (folder / "minilm" / "config.pbtxt").write_text('name: "minilm"\n')
    return folder


@pytest.fixture
def options() -> Options:
    return free_options()


def created(engine: Engine, repository: Path, options: Options) -> dict[str, Any]:
    """The create payload of one `serve`."""
    with container.serve(repository, PYTHON_BACKEND, options):
        pass
    (payload,) = engine.payloads
    return payload


def test_create_image_shm_labels(engine: Engine, repository: Path, options: Options) -> None:
    """The container is NVIDIA's image with 1 GiB of shared memory, our label and auto-remove."""
    payload = created(engine, repository, options)
    assert payload["Image"] == "nvcr.io/nvidia/tritonserver:24.10-py3"
    assert payload["HostConfig"]["ShmSize"] == 1024**3
    assert payload["HostConfig"]["AutoRemove"] is True
    assert payload["Labels"] == {"halimede": "triton"}
    assert payload["Env"] == [
        "TOKENIZERS_PARALLELISM=false",
        "OPENBLAS_NUM_THREADS=1",
        "MALLOC_MMAP_THRESHOLD_=1048576",
    ]


def test_create_mounts(engine: Engine, repository: Path, options: Options) -> None:
    """The repository and our backends are bound read-only, the C++ onnxruntime is not covered."""
    mounts = created(engine, repository, options)["HostConfig"]["Mounts"]
    assert {mount["Target"]: mount["Source"] for mount in mounts} == {
        "/models": str(repository),
        f"{BACKENDS}/tokenizer": str(PYTHON_BACKEND / "tokenizer"),
        f"{BACKENDS}/pooler": str(PYTHON_BACKEND / "pooler"),
        f"{BACKENDS}/image": str(PYTHON_BACKEND / "image"),
        f"{BACKENDS}/fusion": str(PYTHON_BACKEND / "fusion"),
        f"{BACKENDS}/maxsim": str(PYTHON_BACKEND / "maxsim"),
        f"{BACKENDS}/router": str(PYTHON_BACKEND / "router"),
        f"{BACKENDS}/adapter": str(PYTHON_BACKEND / "adapter"),
        f"{BACKENDS}/halimede_engine": str(PYTHON_BACKEND / "halimede_engine"),
        f"{BACKENDS}/halimede_ops": str(PYTHON_BACKEND / "halimede_ops"),
        f"{BACKENDS}/halimede_repository": str(PYTHON_BACKEND / "halimede_repository"),
        "/opt/halimede/halimede_launch": str(PYTHON_BACKEND / "halimede_launch"),
        "/opt/halimede/halimede_ops": str(PYTHON_BACKEND / "halimede_ops"),
        "/opt/halimede/halimede_repository": str(PYTHON_BACKEND / "halimede_repository"),
    }
    assert all(mount["ReadOnly"] and mount["Type"] == "bind" for mount in mounts)
    assert all(Path(mount["Source"]).exists() for mount in mounts)
    assert not any("onnxruntime" in mount["Target"] for mount in mounts)


def test_create_ports(engine: Engine, repository: Path, options: Options) -> None:
    """The three ports are published under their own numbers on the host asked for alone."""
    payload = created(engine, repository, options)
    assert payload["HostConfig"]["PortBindings"] == {
        f"{port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]
        for port in options.ports().values()
    }
    assert set(payload["ExposedPorts"]) == {f"{port}/tcp" for port in options.ports().values()}


def test_host_name_becomes_an_address(engine: Engine, repository: Path, options: Options) -> None:
    """A host given by name is published by its address: the engine takes no names."""
    named = Options(**{**options.model_dump(), "host": "localhost"})
    payload = created(engine, repository, named)
    hosts = {b[0]["HostIp"] for b in payload["HostConfig"]["PortBindings"].values()}
    assert hosts == {"127.0.0.1"}


def test_create_command(engine: Engine, repository: Path, options: Options) -> None:
    """A shell installs this environment's tokenizers and pillow, then starts tritonserver.

    Its arguments are the options', but it listens on every address of the container.
    """
    shell, flag, line = created(engine, repository, options)["Cmd"]
    assert (shell, flag) == ("bash", "-c")
    install, server = (shlex.split(part) for part in line.split(" && "))
    assert install[:4] == ["python3", "-m", "pip", "install"]
    assert install[-2:] == [
        f"{name}=={importlib.metadata.version(name)}" for name in ("tokenizers", "pillow")
    ]
    arguments = options.arguments(inside="0.0.0.0")
    begun = [
        "exec",
        "env",
        "--chdir",
        "/opt/halimede",
        "python3",
        "-m",
        "halimede_launch.start",
        "tritonserver",
    ]
    assert server == [*begun, "--model-repository=/models", *arguments]
    assert "'--load-model=*'" in line, "the shell must not expand it"


@pytest.mark.parametrize(
    ("runtimes", "asked"),
    [
        (["runc"], []),
        (["runc", "nvidia"], [{"Count": -1, "Capabilities": [["gpu"]]}]),
    ],
)
def test_gpus(
    engine: Engine, repository: Path, options: Options, runtimes: list[str], asked: list[Any]
) -> None:
    """All GPUs are asked for exactly when the engine has the nvidia runtime."""
    engine.runtimes = runtimes
    requests = created(engine, repository, options)["HostConfig"].get("DeviceRequests") or []
    assert [{key: r[key] for key in ("Count", "Capabilities")} for r in requests] == asked


def test_another_image(engine: Engine, repository: Path, options: Options) -> None:
    """The caller's image takes the place of the default one."""
    engine.images = {"mine:1"}
    with container.serve(repository, PYTHON_BACKEND, options, image="mine:1"):
        pass
    assert engine.payloads[0]["Image"] == "mine:1"


def test_stopped_and_removed_on_leaving(engine: Engine, repository: Path, options: Options) -> None:
    """Inside it runs and is ready; on leaving it was stopped and no container is left."""
    with container.serve(repository, PYTHON_BACKEND, options) as server:
        assert server.is_running()
        assert len(engine.containers) == 1
    assert "POST /containers/ID/stop" in engine.calls
    assert engine.containers == {}


def test_stopped_and_removed_after_an_exception(
    engine: Engine, repository: Path, options: Options
) -> None:
    """An exception inside passes through, and no container is left."""
    with (
        pytest.raises(KeyboardInterrupt),
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        raise KeyboardInterrupt
    assert "POST /containers/ID/stop" in engine.calls
    assert engine.containers == {}


def test_ends_at_once(engine: Engine, repository: Path, options: Options) -> None:
    """A container that exits before it is ready: the error is its last log line.

    Auto-remove has taken the container and its log by then.
    """

    def fail(started: FakeContainer) -> None:
        started.output.put(b"Looking up the package\n")
        started.output.put(b"ERROR: No matching distribution found for tokenizers\n")
        started.end()

    engine.run = fail
    with (
        pytest.raises(ServeError) as error,
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass
    assert str(error.value) == (
        "Triton's container ended; its last line: "
        "ERROR: No matching distribution found for tokenizers"
    )
    assert engine.containers == {}


def test_model_does_not_load(engine: Engine, repository: Path, options: Options) -> None:
    """A container that ends because of a model: the error names the model and the reason."""

    def fail(started: FakeContainer) -> None:
        started.output.put(
            b"E1 model_lifecycle.cc:642] \"failed to load 'minilm' version 1: Internal: no file\"\n"
        )
        started.output.put(b"error: creating server: Internal - failed to load all models\n")
        started.end()

    engine.run = fail
    with (
        pytest.raises(ServeError, match=r"^model minilm did not load: .*no file"),
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass


def test_ends_while_serving(engine: Engine, repository: Path, options: Options) -> None:
    """A container that ends by itself is not running, and its last log line is the reason. `serve`
    then starts another.
    """
    with container.serve(repository, PYTHON_BACKEND, options) as server:
        (name,) = engine.containers
        engine.containers[name].output.put(b"out of memory\n")
        engine.end(name)
        wait_until(lambda: not server.is_running())
        ended = server.exit_reason()
    assert ended == "Triton's container ended; its last line: out of memory"


def test_never_ready(
    engine: Engine, repository: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that is not ready in time is removed; the error is its last log line."""
    monkeypatch.setattr(container, "READY_TIMEOUT_S", 5.0)
    engine.run = lambda started: started.output.put(b"still loading\n")
    with (
        pytest.raises(ServeError, match="not ready within 5 s; its last line: still loading"),
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass
    assert engine.containers == {}


def test_image_missing(engine: Engine, repository: Path, options: Options) -> None:
    """An image that the engine does not have: the error says how to get it."""
    engine.images = set()
    with (
        pytest.raises(ServeError, match=re.escape(f"Run: docker pull {container.IMAGE}")),
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass


def test_start_refused(engine: Engine, repository: Path, options: Options) -> None:
    """A refused start: one line with the engine's message; the created container is removed."""

    def refuse(_: FakeContainer) -> None:
        raise RefusalError(500, 'could not select device driver ""\nwith capabilities: [[gpu]]')

    engine.run = refuse
    with (
        pytest.raises(ServeError) as error,
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass
    assert "could not select device driver" in str(error.value)
    assert "\n" not in str(error.value)
    assert engine.containers == {}


def test_no_engine(
    repository: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an engine, the error is one line that says to start Docker."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with (
        pytest.raises(ServeError, match="Start Docker") as error,
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass
    assert "\n" not in str(error.value)


def test_no_sdk(repository: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the SDK the error names the extra to install."""
    monkeypatch.setitem(sys.modules, "docker", None)
    with (
        pytest.raises(ServeError, match=re.escape("pip install 'halimede[docker]'")),
        container.serve(repository, PYTHON_BACKEND, options),
    ):
        pass


def test_port_taken(engine: Engine, repository: Path, options: Options) -> None:
    """A taken port raises an error before any request to the engine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", options.http_port))
        taken.listen()
        with (
            pytest.raises(ServeError, match=f"HTTP port {options.http_port} .* is taken"),
            container.serve(repository, PYTHON_BACKEND, options),
        ):
            pass
    assert engine.calls == []


def test_compose_runs_the_gpu_image() -> None:
    """docker-compose.yml builds and runs deploy/gpu.Dockerfile, and changes nothing in it: its
    command, environment, user and files are the image's. Only the models are mounted.
    """
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["triton-gpu"]
    assert service["build"]["dockerfile"] == "deploy/gpu.Dockerfile"
    assert service["image"].split(":")[0] == "halimede/triton-gpu"
    assert service.keys().isdisjoint({"command", "entrypoint", "environment", "user"})
    assert service["shm_size"] == container.SHM_SIZE
    assert service["volumes"] == [f"./model_repository:{container.MODELS}:ro"]
    ports = Options().ports().values()
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    url = f"http://localhost:{Options().http_port}/v2/models/{catalogue.DEFAULT}/infer"
    assert service["healthcheck"]["test"][-1] == url


def relative_files(folder: Path) -> dict[str, bytes]:
    """Path below the folder → content, without what Python compiled."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_gpu_image_has_the_files_that_serve_mounts(tmp_path: Path) -> None:
    """deploy/gpu.Dockerfile's layout, run as written: every file at every mounted path, no other
    file, and the packages that `command` installs.
    """
    module = "halimede_tools.serve.container_files"
    layout = [sys.executable, "-S", "-E", "-m", module, str(PYTHON_BACKEND), str(tmp_path)]
    subprocess.run(layout, cwd=ROOT / "tools", check=True)
    mounts = container.mounts(ROOT / "model_repository", PYTHON_BACKEND)
    del mounts[container.MODELS]
    expected = {
        f"{target}/{name}": content
        for target, source in mounts.items()
        for name, content in relative_files(source).items()
    }
    laid_out = relative_files(tmp_path / "root")
    assert {f"/{name}": content for name, content in laid_out.items()} == expected
    assert (tmp_path / "requirements.txt").read_text().split() == ["tokenizers", "pillow"]
