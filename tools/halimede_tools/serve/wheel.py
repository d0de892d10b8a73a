"""The wheel's Triton as a child process: prepare, start, wait until ready, stop.

The wheel `nvidia-pytriton` has the server, its Python backend and a stub for each Python version.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NoReturn, Protocol

from halimede.config.folders import HOME, writing
from halimede_engine import cores
from halimede_launch import connections, watch
from halimede_ops.errors import ServeError
from halimede_repository import configs
from halimede_tools.console import console
from halimede_tools.serve import addresses, processes, programs, shared_memory
from halimede_tools.serve.options import Options as Options
from halimede_tools.settings import PACKAGES, Settings

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
STOP_POLL_INTERVAL_S = 0.1
ENVIRONMENT = {
    # The tokenizer's own threads would compete with the engine's for the same cores.
    "TOKENIZERS_PARALLELISM": "false",
    # numpy's BLAS starts a thread for each core of the affinity, in each backend. It multiplies the
    # small matrices of fusions, and nothing else.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc returns freed blocks of this many bytes and more to the system. By default it raises the
    # threshold, and each thread keeps its freed blocks.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}
"""Environment of the server and its backends, on this machine and in a container. On this machine,
variables that are already set keep their values."""
RESPONSE_CACHE_MB = "HALIMEDE_RESPONSE_CACHE_MB"
"""Environment variable that the backend `embedder` reads."""
IMPORTED_PACKAGES = ("halimede_engine", "halimede_ops", "halimede_repository")
"""Our packages that the backends import."""


class Running(Protocol):
    """A started server of any runtime."""

    def kill(self) -> None:
        """End the server at once."""
        ...

    def is_running(self) -> bool:
        """Whether the server runs."""
        ...

    def has_lost_a_process(self) -> bool:
        """Whether a process of the server has died while the server runs."""
        ...

    def exit_reason(self) -> str:
        """One line on how the server ended."""
        ...


class Server:
    """A running Triton of the wheel."""

    def __init__(
        self, process: subprocess.Popen[bytes], options: Options, log: Path, entries: str
    ) -> None:
        self.process = process
        self.options = options
        self.log = log
        self.shared_memory = entries
        """Prefix of its entries in /dev/shm. `stop` removes them."""
        self._watch = watch.ChildWatch(process.pid)
        self._backstop = processes.kill_group_after_this_process(
            process.pid, STOP_TIMEOUT_S, str(shared_memory.FOLDER / entries)
        )

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC endpoint."""
        return self.options.grpc_address

    @property
    def http_address(self) -> str:
        """host:port of the HTTP endpoint."""
        return self.options.http_address

    def is_running(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def has_lost_a_process(self) -> bool:
        """Whether a process of its Python backend has died. Requests to that model then fail or
        hang. Poll this regularly.
        """
        return self._watch.has_lost_child()

    def exit_reason(self) -> str:
        """One line with the exit code and the log's path."""
        return f"Triton ended with code {self.process.returncode} (log: {self.log})"

    def kill(self) -> None:
        """Kill the server and every child; open requests fail."""
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        """Stop the server and every child. Requests under way are answered, idle HTTP connections
        are closed. What runs after STOP_TIMEOUT_S seconds, or when this is interrupted, is killed.
        """
        try:
            self.process.terminate()
            self._wait_for_requests()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._backstop.kill()
            self._backstop.wait()
            shared_memory.remove(self.shared_memory)

    def _wait_for_requests(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.is_running() and time.monotonic() < deadline:
            connections.close_idle(self.process.pid, self.options.http_port)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_POLL_INTERVAL_S)


@contextlib.contextmanager
def serve(repository: Path, python_backend: Path, run: Path, options: Options) -> Iterator[Server]:
    """Start a server, and wait until it is ready; stop it on leaving.

    `run` is a folder for the backends and the log.

    Raises:
        ServeError: a port is taken, the wheel or libpython is missing, or a model does not load.
    """
    check_ports(options)
    check_models(repository, options)
    server = _start(repository, python_backend, run, options)
    try:
        if not is_ready_within(READY_TIMEOUT_S, server, server.http_address):
            raise ServeError(_not_ready_reason(server))
        yield server
    finally:
        server.stop()


def exec_server(repository: Path, backends: Path, options: Options) -> NoReturn:
    """Replace this process with a server, as a container needs it: it logs to its output, and ends
    when any of its processes ends. Its cores are the first line.

    Raises:
        ServeError: as `serve`.
    """
    check_ports(options)
    check_models(repository, options)
    shared_memory.remove_stale(options.grpc_port)
    command = [sys.executable, "-m", watch.__name__, *_command(repository, backends, options)]
    console.print(f"CPU: {cores.read()}")
    os.execve(command[0], command, _environment(options))  # noqa: S606


def _start(repository: Path, python_backend: Path, run: Path, options: Options) -> Server:
    shared_memory.remove_stale(options.grpc_port)
    log = run / "triton.log"
    with writing(run, HOME, ServeError):
        backends = lay_out(python_backend, run / "backends")
        if log.exists():  # it may have the reason why the last server ended
            log.replace(run / "triton.before.log")
        log.touch()
    command = _command(repository, backends, options)
    with log.open("wb") as out:
        process = subprocess.Popen(
            processes.ending_with_this_process(command),
            env=_environment(options),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Server(process, options, log, shared_memory.prefix(options.grpc_port))


def _command(repository: Path, backends: Path, options: Options) -> list[str]:
    wheel, port = _wheel(), options.grpc_port
    resolved = options.model_copy(
        update={"models": configs.models_to_load(repository, options.models)}
    )
    return [
        str(wheel / "bin" / "tritonserver"),
        f"--model-repository={shared_memory.shell_safe(repository, 'repository', port)}",
        f"--backend-directory={shared_memory.shell_safe(backends, 'backends', port)}",
        f"--cache-directory={wheel / 'caches'}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory.prefix(port)}",
        *resolved.arguments(),
        *([] if options.steps else [f"--model-config-name={configs.ONE_PROCESS}"]),
    ]


def _wheel() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServeError("Triton is not installed. Run: pip install 'halimede[server]'")
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def wheel_libraries() -> Path:
    """The folder of the wheel's shared libraries."""
    return _wheel().parent.parent / "nvidia_pytriton.libs"


def lay_out(python_backend: Path, folder: Path) -> Path:
    """Create `folder` as a backend directory with Triton's Python backend and ours; return it.

    The files are copies: Triton refuses links that lead out of its backend directory.

    Raises:
        ServeError: the wheel is missing, or has no stub for this Python version.
    """
    wheel = _wheel()
    shutil.rmtree(folder, ignore_errors=True)
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(python_backend, folder, ignore=compiled)
    for package in IMPORTED_PACKAGES:
        if not (folder / package).exists():
            shutil.copytree(source_of(package, python_backend), folder / package, ignore=compiled)
    python = folder / "python"
    python.mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(wheel / "backends" / "python" / name, python)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServeError(f"Triton's wheel has no stub for Python {version}; use 3.11 or 3.12")
    shutil.copy2(stub, python)
    return folder


def source_of(name: str, python_backend: Path) -> Path:
    """The folder of a backend, or of a package that backends import. A checkout has both in
    python_backend/; an installed wheel has the packages in site-packages.
    """
    path = python_backend / name
    return path if path.exists() else PACKAGES / name


def _environment(options: Options) -> dict[str, str]:
    folders = {"libraries": wheel_libraries(), "libpython": libpython().parent}
    libraries = [
        str(shared_memory.shell_safe(folder, name, options.grpc_port))
        for name, folder in folders.items()
    ]
    bin_folder = str(Path(sys.executable).parent)
    return {
        **ENVIRONMENT,
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "PATH": f"{bin_folder}:{os.environ.get('PATH', '')}",
        "PYTHONDONTWRITEBYTECODE": "1",
        RESPONSE_CACHE_MB: str(options.response_cache_mb),
    }


def libpython() -> Path:
    """The shared library of the running Python. Triton's Python stub links it.

    Raises:
        ServeError: it is missing; the message names the package that has it.
    """
    path = programs.libpython()
    if path is None:
        raise ServeError(
            f"lib{programs.PYTHON}.so.1.0 was not found. On Debian and Ubuntu run: "
            f"{programs.install_command('libpython')}"
        )
    return path


def check_ports(options: Options) -> None:
    """Raise unless every port is free on the host.

    Raises:
        ServeError: one is taken, or the host is not this machine.
    """
    for name, port in options.ports().items():
        host = options.http_host if name == "HTTP" else options.host
        addresses.check_port(name, host, port)


def check_models(repository: Path, options: Options) -> None:
    """Raise unless the requested models are in the repository and built with their steps.

    Raises:
        ServeError: one is missing or not built.
    """
    listed = {path.parent.name: path for path in repository.glob("*/config.pbtxt")}
    for model in options.models:
        if model not in listed:
            raise ServeError(
                f"{model!r} is not in the repository; it has: {', '.join(sorted(listed))}"
            )
    for model in options.models or listed:
        for name in (model, *configs.steps(listed[model].read_text())):
            if not shared_memory.is_shell_safe(name):
                raise ServeError(
                    f"{name!r} has a character that a shell interprets, and Triton starts its "
                    "backends through a shell. Build the model with another --name."
                )
            if not configs.is_built(repository / name):
                raise ServeError(f"{name} is not built. Run: make build")


def is_ready_within(timeout_s: float, server: Running, http_address: str) -> bool:
    """Wait until all models are ready. False after `timeout_s`, when the server ends, or when a
    process of it has died.
    """
    deadline = time.monotonic() + timeout_s
    next_watch = 0.0
    while time.monotonic() < deadline and server.is_running():
        if time.monotonic() >= next_watch:
            if server.has_lost_a_process():
                return False
            next_watch = time.monotonic() + watch.POLL_INTERVAL_S
        with contextlib.suppress(OSError, HTTPException):
            # HTTP: gRPC with TLS may require a client's certificate.
            if _answers_ready(http_address):
                return True
        time.sleep(0.05)
    return False


def _answers_ready(http_address: str) -> bool:
    # http.client: urllib would ask a proxy of the environment.
    with contextlib.closing(HTTPConnection(http_address, timeout=1)) as connection:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == HTTPStatus.OK


def _not_ready_reason(server: Server) -> str:
    if server.has_lost_a_process():
        last = last_line(server.log.read_text(errors="replace"))
        return f"a process of Triton's Python backend died: {last} (log: {server.log})"
    if server.is_running():
        return f"Triton was not ready within {READY_TIMEOUT_S:.0f} s; see {server.log}"
    ended = f"Triton ended with code {server.process.returncode}"
    reason = failure_reason(server.log.read_text(errors="replace"), ended)
    return f"{reason} (log: {server.log})"


def failure_reason(log: str, ended: str) -> str:
    """One line: the model that failed to load by the log; else `ended` and the log's last line."""
    failed = re.search(r"failed to load '([^']+)'[^:]*: (.*)", log)
    if failed:
        reason = re.sub(r"^(\w+: )*", "", failed[2].split("\\n")[0]).strip()
        return f"model {failed[1]} did not load: {reason}"
    return f"{ended}: {last_line(log)}"


def last_line(log: str) -> str:
    """The last line of a server's log."""
    return (log.strip().splitlines() or ["no output"])[-1]


if __name__ == "__main__":  # deploy/cpu.Dockerfile
    lay_out(Settings().python_backend, Path(sys.argv[1]))
