"""One real Triton for the whole run, on free ports, with the real weights."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import psutil
import pytest
from filelock import FileLock
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

ROOT = Path(__file__).resolve().parents[1]
from halimede_engine import cores
from halimede_repository import checksums, configs
from halimede_tools.build.samples import corpus
from halimede_tools.serve import ports, programs, wheel
from halimede_tools.settings import Settings

pytest_plugins = ("gateways",)
"""Fixtures of one subject that several files use."""
MODEL = "all-MiniLM-L6-v2"
PRECISIONS = ("fp32", "fp16", "int8")
POISON, POISON_ID = "[MASK]", 103
"""A token of the default model that no other text has, and its id."""
NAMES = {"fp32": MODEL, "fp16": f"{MODEL}-fp16", "int8": f"{MODEL}-int8"}


def pytest_configure() -> None:
    # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Examples may take as long as a busy machine needs.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("untimed")
    # A port is free until its server is up: no other process of these tests may draw it meanwhile.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    mine = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    each = len(ports.PORTS) // processes
    ports.PORTS = ports.PORTS[mine * each : (mine + 1) * each]


def require(program: str) -> None:
    """Skip the test where a program is not installed, and say how to install it. In CI, which must
    have every program, the test fails instead.
    """
    command = programs.install_command(program)
    if command and os.environ.get("CI"):
        pytest.fail(f"{program} is not installed. Run: {command}", pytrace=False)
    if command:
        pytest.skip(f"{program} is not installed. Run: {command}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        require(mark.args[0])


def free_options(**fields: object) -> wheel.Options:
    """Options with three free ports."""
    http, grpc, metrics = ports.free_ports(3)
    return wheel.Options(http_port=http, grpc_port=grpc, metrics_port=metrics, **fields)


def wait_until(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return as soon as it holds; on any machine it does in a part of this time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.01)


def version_folder(model: Path) -> Path:
    """The one version folder that a model's config names."""
    [version] = configs.versions((model / configs.CONFIG).read_text())
    return model / str(version)


def family(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def resident_bytes(pid: int) -> int:
    """Memory of a process and its children, what they share counted in each."""
    return sum(process.memory_info().rss for process in family(pid))


def own_bytes(pid: int) -> int:
    """Memory of a process and its children, without files they map: of those, what counts as
    theirs changes with every other server that maps them.
    """
    total_kb = 0
    for process in family(pid):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, *values = line.split()
            total_kb += int(values[0]) if name in ("Pss_Anon:", "Pss_Shmem:") else 0
    return 1024 * total_kb


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings()


@pytest.fixture
def sole_build(settings: Settings) -> Iterator[None]:
    """Meanwhile no other test builds or deploys the default model: one of both would be refused."""
    with FileLock(settings.home / "tests.lock"):
        yield


@pytest.fixture(scope="session")
def tracers() -> TracerProvider:
    """The process' provider of OpenTelemetry's tracers: it can be set once."""
    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture(scope="session")
def server(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    """A running Triton with all precisions of the default model, each in one process."""
    run = tmp_path_factory.mktemp("triton")
    with wheel.serve(settings.repository, settings.python_backend, run, free_options()) as running:
        yield running


@pytest.fixture(scope="session")
def steps_server(
    settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[wheel.Server]:
    """A running Triton with the default model in FP32, as an ensemble of its steps."""
    run = tmp_path_factory.mktemp("steps")
    options = free_options(models=(MODEL,), steps=True)
    with wheel.serve(settings.repository, settings.python_backend, run, options) as running:
        yield running


@pytest.fixture(scope="session")
def poisoned(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's repository with NaN as the embedding of the token POISON: in FP32, a text
    that has it has no finite vector.
    """
    repository = tmp_path_factory.mktemp("poisoned") / "repository"
    shutil.copytree(settings.repository, repository, copy_function=os.link)
    folder = version_folder(repository / f"{MODEL}-onnx")
    [embedding] = [
        tensor
        for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
        if tensor.name.endswith("word_embeddings.weight")
    ]
    offset = {entry.key: entry.value for entry in embedding.external_data}["offset"]
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    rows = np.frombuffer(content, np.float32, int(np.prod(embedding.dims)), int(offset))
    rows.reshape(embedding.dims)[POISON_ID] = np.nan
    data.unlink()  # it is a link to the file of the default repository
    data.write_bytes(content)
    sums = folder / checksums.FILE_NAME
    listed = [folder / line.split()[1] for line in sums.read_text().splitlines()]
    sums.unlink()
    sums.write_text(checksums.sha256sums(listed))
    return repository


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """600 texts: short, long, beyond 256 tokens, emoji, Chinese, Arabic, control, empty."""
    return corpus.check_texts()


@pytest.fixture(scope="session")
def source(settings: Settings) -> Path:
    """The folder of the default model's own weights."""
    return settings.home / "models" / MODEL / "source"


@pytest.fixture(scope="session")
def expected(source: Path, texts: list[str]) -> np.ndarray:
    """sentence-transformers' embeddings of `texts`."""
    from halimede_tools.build.check import reference
    from halimede_tools.build.describe import ModelOptions

    return reference(source, texts, ModelOptions(MODEL))


def _remove_cgroup(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a process that was killed may not have ended yet
        folder.rmdir()


@pytest.fixture
def one_cpu() -> Iterator[Path]:
    """`cgroup.procs` of a real cgroup with a quota of one CPU, of either version."""
    for mount in cores.mounts():
        folder = Path(mount.point) / f"halimede-test-{os.getpid()}"
        quota, value = (
            ("cpu.cfs_quota_us", "100000") if mount.controller else ("cpu.max", "100000 100000")
        )
        try:
            folder.mkdir()
        except OSError:
            continue
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_cgroup, folder)
            if not (folder / quota).exists():
                continue
            (folder / quota).write_text(value)
            yield folder / "cgroup.procs"
            return
    pytest.skip("no cgroup with a CPU quota can be made here; run as root on cgroups v1 or v2")
