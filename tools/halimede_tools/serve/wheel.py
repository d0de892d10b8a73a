"""The wheel's Triton as a child process: prepare, start, wait until ready, stop.

The wheel `nvidia-pytriton` carries the server, its Python backend and one stub a Python version.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.request import urlopen

from pydantic import BaseModel, NonNegativeInt, model_validator

from halimede_launch import start, watch
from halimede_ops.errors import ServeError
from halimede_repository import configs

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend makes its regions
LOOPBACK = "127.0.0.1"
LOCAL_HOSTS = (LOOPBACK, "localhost")
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Program that asks the kernel to end it with its launcher, then becomes its arguments. Not a
preexec_fn: that runs Python between fork and exec, where gRPC's threads may crash it."""
CONNECTION_AGE_MS = 300_000
"""Clients connect anew this often, and so find servers that were added behind a name."""
CONNECTION_GRACE_MS = 60_000
"""Time for the requests of an old connection to end."""
KEPT_MESSAGES = 1
"""Request messages that each of Triton's threads keeps for the next requests, at the size of the
largest they ever had: with Triton's 8, some requests of 4 MB cost 100 MB for good."""
ENVIRONMENT = {
    # The tokenizer's own threads would compete with the engine's for the same cores.
    "TOKENIZERS_PARALLELISM": "false",
    # Blocks of this many bytes and more go back to the system when they are freed: glibc would
    # raise the limit with each of them, keep them, and for each thread others.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}
"""Of the server and its backends, here and in a container."""
RESPONSE_CACHE_MB = "HALIMEDE_RESPONSE_CACHE_MB"
"""Environment variable that the backend `embedder` reads."""
LOG_LEVELS = ("error", "warning", "info", "verbose")


class Options(BaseModel):
    """How a server is started."""

    host: str = LOOPBACK
    """Address to listen on; loopback unless asked otherwise."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    log_level: str = "warning"
    """error, warning, info or verbose."""
    models: tuple[str, ...] = ()
    """Models to serve, without their composing models; empty: all of the repository."""
    steps: bool = False
    """Whether the wheel serves each ensemble's steps, as NVIDIA's container does, instead of one
    process that does what they do."""
    response_cache_mb: NonNegativeInt = 0
    """Memory of each model for what was asked before; 0: none."""
    tls_cert: Path | None = None
    """PEM certificate of the server: gRPC speaks TLS, and HTTP, which cannot, stays on loopback."""
    tls_key: Path | None = None
    """PEM key of the certificate."""
    tls_client_ca: Path | None = None
    """PEM certificates that sign clients: without one of theirs, a client is refused."""
    control_key_file: Path | None = None
    """File with the key that CONTROL_APIS ask for. Without one they are open on loopback, and
    closed to everybody elsewhere."""

    trace_url: str = ""
    """OpenTelemetry collector that is told of requests, such as http://127.0.0.1:4318/v1/traces."""
    trace_every: int = 100
    """Of how many requests one is traced; one whose caller traces it always is."""

    @model_validator(mode="after")
    def _cache_has_its_process(self) -> Options:
        if self.steps and self.response_cache_mb:
            raise ServeError("the steps have no response cache; leave out --steps or the cache.")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Options:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServeError("TLS needs both --tls-cert and --tls-key.")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ServeError("--tls-client-ca needs --tls-cert and --tls-key beside it.")
        for path in (self.tls_cert, self.tls_key, self.tls_client_ca, self.control_key_file):
            if path is not None and not os.access(path, os.R_OK):
                raise ServeError(f"{path} cannot be read.")
        return self

    @property
    def http_host(self) -> str:
        """Address that HTTP listens on."""
        return self.host if self.tls_cert is None else LOOPBACK

    def ports(self) -> dict[str, int]:
        """Ports by their names."""
        return {"HTTP": self.http_port, "gRPC": self.grpc_port, "metrics": self.metrics_port}

    def arguments(self, inside: str | None = None) -> list[str]:
        """The arguments of tritonserver; the same for the wheel's and for NVIDIA's container.

        `inside` is the address to listen on in a container whose ports are published on `host`.
        """
        loaded = self.models or ("*",)
        return [
            "--model-control-mode=explicit",
            *[f"--load-model={model}" for model in loaded],
            "--disable-auto-complete-config",
            "--exit-on-error=true",
            "--strict-readiness=true",
            f"--http-address={inside or self.http_host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={inside or self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--grpc-infer-allocation-pool-size={KEPT_MESSAGES}",
            f"--grpc-max-connection-age={CONNECTION_AGE_MS}",
            f"--grpc-max-connection-age-grace={CONNECTION_GRACE_MS}",
            f"--metrics-address={inside or self.host}",
            f"--metrics-port={self.metrics_port}",
            *_log_arguments(self.log_level),
            *self._tls_arguments(),
            *self._restrictions(),
            *self._trace_arguments(),
        ]

    def _trace_arguments(self) -> list[str]:
        if not self.trace_url:
            return []
        return [
            "--trace-config=mode=opentelemetry",
            "--trace-config=level=TIMESTAMPS",
            "--trace-config=count=-1",
            f"--trace-config=rate={self.trace_every}",
            f"--trace-config=opentelemetry,url={self.trace_url}",
            "--trace-config=opentelemetry,resource=service.name=triton",
        ]

    def _tls_arguments(self) -> list[str]:
        if self.tls_cert is None:
            return []
        arguments = [f"--grpc-server-cert={self.tls_cert}", f"--grpc-server-key={self.tls_key}"]
        if self.tls_client_ca is None:
            return ["--grpc-use-ssl=true", *arguments]
        return ["--grpc-use-ssl-mutual=true", *arguments, f"--grpc-root-cert={self.tls_client_ca}"]

    def _restrictions(self) -> list[str]:
        if self.control_key_file is not None:
            key = self.control_key_file.read_text().strip()
        elif self.host in LOCAL_HOSTS:
            return []
        else:
            key = start.random_key()
        return start.restrictions(key)


def _log_arguments(level: str) -> list[str]:
    if level not in LOG_LEVELS:
        raise ServeError(f"log level {level!r} is unknown; use one of {', '.join(LOG_LEVELS)}")
    rank = LOG_LEVELS.index(level)
    return [
        "--log-error=true",
        f"--log-warning={str(rank >= 1).lower()}",
        f"--log-info={str(rank >= 2).lower()}",
        f"--log-verbose={int(rank >= 3)}",
    ]


class Running(Protocol):
    """A started server of any runtime."""

    def kill(self) -> None:
        """End it at once."""
        ...

    def is_running(self) -> bool:
        """Whether it still runs."""
        ...

    def has_lost_a_process(self) -> bool:
        """Whether it goes on without one of its processes, which it does not tell."""
        ...

    def how_it_ended(self) -> str:
        """One line, once it no longer runs."""
        ...


class Server:
    """A running Triton of the wheel."""

    def __init__(
        self, process: subprocess.Popen[bytes], options: Options, log: Path, shared_memory: str
    ) -> None:
        self.process = process
        self.options = options
        self.log = log
        self.shared_memory = shared_memory
        """Prefix of its regions in /dev/shm, removed when it stops."""
        self._watch = watch.ChildWatch(process.pid)

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC endpoint."""
        return f"{self.options.host}:{self.options.grpc_port}"

    @property
    def http_address(self) -> str:
        """host:port of the HTTP endpoint."""
        return f"{self.options.http_host}:{self.options.http_port}"

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self.process.poll() is None

    def has_lost_a_process(self) -> bool:
        """Whether a process of its Python backend has died: it then answers no request of that
        model, and some never. To be asked again and again.
        """
        return self._watch.has_lost_child()

    def how_it_ended(self) -> str:
        """One line, once it no longer runs."""
        return f"Triton ended with code {self.process.returncode} (log: {self.log})"

    def kill(self) -> None:
        """End the server and every child without a word to its callers."""
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        """Stop the server and every child; kill what has not ended in STOP_TIMEOUT_S."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in SHARED_MEMORY.glob(f"{self.shared_memory}*"):
            region.unlink(missing_ok=True)


@contextlib.contextmanager
def serve(repository: Path, python_backend: Path, run: Path, options: Options) -> Iterator[Server]:
    """A server that is ready; stopped on leaving.

    `run` is a folder for the backends and the log.

    Raises:
        ServeError: a port is taken, the wheel or libpython is missing, a model does not load.
    """
    check_ports(options)
    check_models(repository, options)
    server = _start(repository, python_backend, run, options)
    try:
        if not is_ready_within(READY_TIMEOUT_S, server, server.http_address):
            raise ServeError(_why_not_ready(server))
        yield server
    finally:
        server.stop()


def become(repository: Path, backends: Path, options: Options) -> NoReturn:
    """Replace this process by a server that logs to its output and ends with any of its processes,
    as a container wants it.

    Raises:
        ServeError: as `serve`.
    """
    check_ports(options)
    check_models(repository, options)
    _forget_regions(options)
    command = [sys.executable, watch.__file__, *_command(repository, backends, options)]
    os.execve(command[0], command, _environment(options))  # noqa: S606


def _start(repository: Path, python_backend: Path, run: Path, options: Options) -> Server:
    _forget_regions(options)
    log = run / "triton.log"
    try:
        backends = lay_out(python_backend, run / "backends")
        if log.exists():  # it may say why the server before this one ended
            log.replace(run / "triton.before.log")
        log.touch()
    except OSError as error:
        reason = re.search(r"\[Errno \d+\] ([^:]*)", str(error))  # shutil's own names each file
        raise ServeError(
            f"{run} cannot be written: {reason[1] if reason else error}. Free space there, or set "
            "HALIMEDE_HOME to another folder."
        ) from None
    command = _command(repository, backends, options)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, *command],
            env=_environment(options),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Server(process, options, log, _shared_memory(options))


def _command(repository: Path, backends: Path, options: Options) -> list[str]:
    wheel = _wheel()
    whole = options.model_copy(
        update={"models": configs.models_to_load(repository, options.models)}
    )
    return [
        str(wheel / "bin" / "tritonserver"),
        f"--model-repository={repository.resolve()}",
        f"--backend-directory={backends.resolve()}",
        f"--cache-directory={wheel / 'caches'}",
        f"--backend-config=python,shm-region-prefix-name={_shared_memory(options)}",
        *whole.arguments(),
        *([] if options.steps else [f"--model-config-name={configs.ONE_PROCESS}"]),
    ]


def _shared_memory(options: Options) -> str:
    """Prefix of the regions of a server that this process starts."""
    return f"halimede-{os.getpid()}-{options.grpc_port}-"


def _forget_regions(options: Options) -> None:
    """Remove what servers that were killed left in memory. Their port is free."""
    for region in SHARED_MEMORY.glob(f"halimede-*-{options.grpc_port}-*"):
        started_by = int(region.name.split("-")[1])
        if started_by == os.getpid() or not Path(f"/proc/{started_by}").exists():
            region.unlink(missing_ok=True)


def _wheel() -> Path:
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        raise ServeError("Triton is not installed. Run: pip install 'halimede[server]'")
    return Path(found.submodule_search_locations[0]) / "tritonserver"


def wheel_libraries() -> Path:
    """The folder of the shared libraries that the wheel carries."""
    return _wheel().parent.parent / "nvidia_pytriton.libs"


def lay_out(python_backend: Path, folder: Path) -> Path:
    """`folder` as a backend directory with Triton's Python backend and ours side by side.

    Copies: Triton refuses a link that leads out of its backend directory.

    Raises:
        ServeError: the wheel is missing, or has no stub for this Python.
    """
    wheel = _wheel()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(python_backend, folder, ignore=shutil.ignore_patterns("__pycache__"))
    python = folder / "python"
    python.mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(wheel / "backends" / "python" / name, python)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServeError(f"Triton's wheel has no stub for Python {version}; use 3.10 to 3.13")
    shutil.copy2(stub, python)
    return folder


def _environment(options: Options) -> dict[str, str]:
    libraries = [str(wheel_libraries()), str(libpython().parent)]
    bin_folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "PATH": f"{bin_folder}:{os.environ.get('PATH', '')}",
        **ENVIRONMENT,
        "PYTHONDONTWRITEBYTECODE": "1",
        RESPONSE_CACHE_MB: str(options.response_cache_mb),
    }


def libpython() -> Path:
    """The shared library of the running Python, which Triton's stub links.

    Raises:
        ServeError: it is not there; the message names the package that brings it.
    """
    name = sysconfig.get_config_var("INSTSONAME")
    folders = [sysconfig.get_config_var("LIBDIR"), "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    for folder in folders:
        path = Path(folder or "/") / str(name)
        if str(name).endswith((".so", ".so.1.0")) and path.exists():
            return path
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise ServeError(
        f"libpython{version}.so.1.0 was not found. On Debian and Ubuntu run: "
        f"apt-get install libpython{version}"
    )


def check_ports(options: Options) -> None:
    """Nothing when every port is free on the host.

    Raises:
        ServeError: one is taken.
    """
    for name, port in options.ports().items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, port))
            except OSError:
                raise ServeError(
                    f"{name} port {port} on {options.host} is taken. Stop what uses it, or "
                    f"choose another with --{name.lower()}-port."
                ) from None


def check_models(repository: Path, options: Options) -> None:
    """Nothing when the models asked for are in the repository and all of it is built.

    Raises:
        ServeError: one is not.
    """
    served = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    for model in options.models:
        if model not in served:
            raise ServeError(
                f"{model!r} is not in the repository; it has: {', '.join(sorted(served))}"
            )
    for name in served:
        if not configs.is_built(repository / name):
            raise ServeError(f"{name} is not built. Run: make build")


def is_ready_within(timeout_s: float, server: Running, http_address: str) -> bool:
    """Whether the server's models are all ready in time; False at once when it ends."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.is_running():
        with contextlib.suppress(OSError, HTTPException):
            # HTTP: over gRPC, TLS would ask for a client's certificate.
            with urlopen(f"http://{http_address}/v2/health/ready", timeout=1):
                return True
        time.sleep(0.05)
    return False


def _why_not_ready(server: Server) -> str:
    if server.is_running():
        return f"Triton was not ready within {READY_TIMEOUT_S:.0f} s; see {server.log}"
    ended = f"Triton ended with code {server.process.returncode}"
    reason = why_it_ended(server.log.read_text(errors="replace"), ended)
    return f"{reason} (log: {server.log})"


def why_it_ended(log: str, ended: str) -> str:
    """One line from the log of a server: the model that failed to load, else `ended`: last line."""
    failed = re.search(r"failed to load '([^']+)'[^:]*: (.*)", log)
    if failed:
        reason = re.sub(r"^(\w+: )*", "", failed[2].split("\\n")[0]).strip()
        return f"model {failed[1]} did not load: {reason}"
    return f"{ended}: {last_line(log)}"


def last_line(log: str) -> str:
    """The last line of a server's log."""
    return (log.strip().splitlines() or ["no output"])[-1]
