"""NVIDIA's Triton container: the same repository on the C++ ONNX Runtime backend."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from halimede_ops.errors import ServeError
from halimede_tools.serve import container_files, wheel
from halimede_tools.serve.options import Options

IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
"""The same Triton release as the wheel's."""
MODELS = "/models"
SHM_SIZE = "1g"
"""For the tensors that Triton and its Python backends exchange; Docker's default is 64 MB."""
EVERYWHERE = "0.0.0.0"  # noqa: S104 - from outside, the ports are reached where they are published
LABELS = {"halimede": "triton"}
READY_TIMEOUT_S = 600.0
"""Installing the tokenizer, starting CUDA and loading every model."""
STOP_TIMEOUT_S = 20
KEPT_LOG_BYTES = 64 * 1024


class Container:
    """A container that is attached to and then started."""

    def __init__(self, container: Any) -> None:
        self._log = b""
        # Attached before the start: a container that ends at once takes its log with it.
        output = container.attach(stdout=True, stderr=True, stream=True)
        self._reader = threading.Thread(target=self._keep, args=(output,), daemon=True)
        self._reader.start()
        container.start()

    def is_running(self) -> bool:
        """Whether it still runs: its output ends with it."""
        return self._reader.is_alive()

    def has_lost_a_process(self) -> bool:
        """Never: it is watched inside, and ends."""
        return False

    def kill(self) -> None:
        """Nothing: leaving `serve` ends it."""

    def why_not_ready(self) -> str:
        """One line: the model that did not load, or how far it came and its log's last line."""
        state = f"was not ready within {READY_TIMEOUT_S:.0f} s" if self.is_running() else "ended"
        return wheel.why_it_ended(self._text(), f"Triton's container {state}; its last line")

    def how_it_ended(self) -> str:
        """One line, once it no longer runs."""
        return f"Triton's container ended; its last line: {wheel.last_line(self._text())}"

    def _text(self) -> str:
        return self._log.decode(errors="replace")

    def _keep(self, output: Iterable[bytes]) -> None:
        with contextlib.suppress(OSError):  # the engine went away: the output ends too
            for chunk in output:
                self._log = (self._log + chunk)[-KEPT_LOG_BYTES:]


@contextlib.contextmanager
def serve(
    repository: Path, python_backend: Path, options: Options, image: str = IMAGE
) -> Iterator[Container]:
    """A container that is ready; stopped and removed on leaving.

    Raises:
        ServeError: a port is taken, the SDK, the engine or the image is missing, a model does
            not load.
    """
    wheel.check_ports(options)
    wheel.check_models(repository, options)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(contextlib.closing(_engine()))
        with _refusals_told(image):
            container = _create(engine, mounts(repository, python_backend), options, image)
            stack.callback(_remove, container)
            server = Container(container)
        address = f"{options.http_host}:{options.http_port}"
        if not wheel.is_ready_within(READY_TIMEOUT_S, server, address):
            raise ServeError(server.why_not_ready())
        stack.callback(_stop, container)
        yield server


def mounts(repository: Path, python_backend: Path) -> dict[str, Path]:
    """Path in the container → path here, all read-only."""
    files = container_files.targets().items()
    return {
        MODELS: repository,
        **{target: wheel.source_of(name, python_backend) for target, name in files},
    }


def command(options: Options) -> list[str]:
    """What the container runs: add the packages our backends need, then start Triton."""
    packages = [
        f"{name}=={importlib.metadata.version(name)}" for name in container_files.REQUIREMENTS
    ]
    # tokenizers' dependencies only download models; pip's notice of a new pip would hide why
    # it failed.
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
    start += options.arguments(inside=EVERYWHERE)
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


def _create(engine: Any, mounted: dict[str, Path], options: Options, image: str) -> Any:
    from docker import types

    address = socket.gethostbyname(options.host)  # the engine takes no names
    return engine.containers.create(
        image,
        command(options),
        mounts=[
            types.Mount(target, str(source.resolve()), type="bind", read_only=True)
            for target, source in mounted.items()
        ],
        ports={f"{port}/tcp": (address, port) for port in options.ports().values()},
        environment=wheel.ENVIRONMENT,
        shm_size=SHM_SIZE,
        device_requests=_gpus(engine),
        labels=LABELS,
        auto_remove=True,
    )


def _gpus(engine: Any) -> list[Any]:
    """All GPUs where the engine can pass them on, else none."""
    from docker import types

    if "nvidia" not in (engine.info().get("Runtimes") or {}):
        return []
    return [types.DeviceRequest(count=-1, capabilities=[["gpu"]])]


@contextlib.contextmanager
def _refusals_told(image: str) -> Iterator[None]:
    """What the engine refuses becomes a ServeError of one line."""
    from docker import errors

    try:
        yield
    except errors.ImageNotFound:
        raise ServeError(f"Docker has no image {image}. Run: docker pull {image}") from None
    except errors.APIError as error:
        reason = " ".join(str(error.explanation).split())
        raise ServeError(f"Docker could not start {image}: {reason}") from None


def _stop(container: Any) -> None:
    with contextlib.suppress(OSError):  # it has ended and is removed, or the engine is gone
        container.stop(timeout=STOP_TIMEOUT_S)


def _remove(container: Any) -> None:
    """Kill what still runs and remove it."""
    with contextlib.suppress(OSError):  # the engine's own auto-remove came first
        container.remove(force=True)
