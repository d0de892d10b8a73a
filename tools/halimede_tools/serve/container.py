"""NVIDIA's Triton container: the same repository on the C++ ONNX Runtime backend."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from halimede_ops.errors import ServeError
from halimede_tools.serve import container_files, wheel
from halimede_tools.serve.options import Options

IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
"""The Triton release that the wheel has, too."""
MODELS = "/models"
SHM_SIZE = "1g"
"""Triton and its Python backends exchange tensors in it. Docker's default is 64 MB."""
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - Docker publishes the ports on the host's address
LABELS = {"halimede": "triton"}
READY_TIMEOUT_S = 600.0
"""Time to install the packages, start CUDA and load every model."""
STOP_TIMEOUT_S = 20
LOG_TAIL_BYTES = 64 * 1024


class Container:
    """A started container, and the end of its log."""

    def __init__(self, container: Any) -> None:
        self._log = b""
        # Attach before the start: auto-remove deletes the log of a container that ends at once.
        output = container.attach(stdout=True, stderr=True, stream=True)
        self._reader = threading.Thread(target=self._read_output, args=(output,), daemon=True)
        self._reader.start()
        container.start()

    def is_running(self) -> bool:
        """Whether the container runs: its output ends with it."""
        return self._reader.is_alive()

    def has_lost_a_process(self) -> bool:
        """False: `halimede_launch` watches the processes and ends the container."""
        return False

    def kill(self) -> None:
        """Do nothing: leaving `serve` ends the container."""

    def not_ready_reason(self) -> str:
        """One line: the model that did not load, or the state and the log's last line."""
        state = f"was not ready within {READY_TIMEOUT_S:.0f} s" if self.is_running() else "ended"
        return wheel.failure_reason(self._log_text(), f"Triton's container {state}; its last line")

    def exit_reason(self) -> str:
        """One line on how the container ended, with the log's last line."""
        return f"Triton's container ended; its last line: {wheel.last_line(self._log_text())}"

    def _log_text(self) -> str:
        return self._log.decode(errors="replace")

    def _read_output(self, output: Iterable[bytes]) -> None:
        with contextlib.suppress(OSError):  # the engine stopped: the output ends, too
            for chunk in output:
                self._log = (self._log + chunk)[-LOG_TAIL_BYTES:]


@contextlib.contextmanager
def serve(
    repository: Path, python_backend: Path, options: Options, image: str = IMAGE
) -> Iterator[Container]:
    """Start a container, and wait until it is ready; stop and remove it on leaving.

    Raises:
        ServeError: a port is taken; the SDK, the engine or the image is missing; or a model does
            not load.
    """
    wheel.check_ports(options)
    wheel.check_models(repository, options)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(contextlib.closing(_engine()))
        with _docker_errors_translated(image):
            container = _create(engine, mounts(repository, python_backend), options, image)
            stack.callback(_remove, container)
            server = Container(container)
        if not wheel.is_ready_within(READY_TIMEOUT_S, server, options.http_address):
            raise ServeError(server.not_ready_reason())
        stack.callback(_stop, container)
        yield server


def mounts(repository: Path, python_backend: Path) -> dict[str, Path]:
    """Path in the container → path on this machine. All are mounted read-only."""
    files = container_files.targets().items()
    return {
        MODELS: repository,
        **{target: wheel.source_of(name, python_backend) for target, name in files},
    }


def command(options: Options) -> list[str]:
    """The container's command: install the packages that our backends need, then start Triton."""
    packages = [
        f"{name}=={importlib.metadata.version(name)}" for name in container_files.REQUIREMENTS
    ]
    # --no-deps: tokenizers' dependencies only download models. Without the version check, the last
    # line of the log is the reason of a failure.
    install = ["python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", *packages]
    start = [
        "env",
        "--chdir",
        container_files.LAUNCH_DIRECTORY,
        "python3",
        "-m",
        "halimede_launch.start",
    ]
    start += ["tritonserver", f"--model-repository={MODELS}"]
    start += options.arguments(inside=ANY_ADDRESS)
    return ["bash", "-c", f"{shlex.join(install)} && exec {shlex.join(start)}"]


def _engine() -> Any:
    try:
        from docker import errors, from_env
    except ImportError:
        raise ServeError(
            "Docker's SDK is not installed. Run: pip install 'halimede[docker]'"
        ) from None
    try:
        return from_env()
    except errors.DockerException:
        raise ServeError(
            "no Docker engine answers. Start Docker, or point DOCKER_HOST at its socket, "
            "or serve with --runtime wheel."
        ) from None


def _create(engine: Any, mounts: dict[str, Path], options: Options, image: str) -> Any:
    from docker import types

    return engine.containers.create(
        image,
        command(options),
        mounts=[
            types.Mount(target, str(source.resolve()), type="bind", read_only=True)
            for target, source in mounts.items()
        ],
        ports={f"{port}/tcp": (options.host, port) for port in options.ports().values()},
        environment=wheel.ENVIRONMENT,
        shm_size=SHM_SIZE,
        device_requests=_gpus(engine),
        labels=LABELS,
        auto_remove=True,
    )


def _gpus(engine: Any) -> list[Any]:
    """A request for all GPUs if the engine has NVIDIA's runtime; else none."""
    from docker import types

    if "nvidia" not in (engine.info().get("Runtimes") or {}):
        return []
    return [types.DeviceRequest(count=-1, capabilities=[["gpu"]])]


@contextlib.contextmanager
def _docker_errors_translated(image: str) -> Iterator[None]:
    """Raise the engine's errors as ServeErrors of one line."""
    from docker import errors

    try:
        yield
    except errors.ImageNotFound:
        raise ServeError(f"Docker has no image {image}. Run: docker pull {image}") from None
    except errors.APIError as error:
        reason = " ".join(str(error.explanation).split())
        raise ServeError(f"Docker could not start {image}: {reason}") from None


def _stop(container: Any) -> None:
    with contextlib.suppress(OSError):  # already removed, or the engine stopped
        container.stop(timeout=STOP_TIMEOUT_S)


def _remove(container: Any) -> None:
    """Kill and remove the container."""
    with contextlib.suppress(OSError):  # auto-remove was first
        container.remove(force=True)
