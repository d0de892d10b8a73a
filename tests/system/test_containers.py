"""The CPU stack of docker-compose.yml in Docker: `make test-containers`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import free_options
from test_deploy import probes

from halimede import Embedder
from halimede_launch.watch import CHILD_DIED
from halimede_tools.serve import container
from halimede_tools.settings import Settings

pytestmark = pytest.mark.containers

ROOT = Path(__file__).resolve().parents[2]
LABEL = "label=com.docker.compose.project=halimede"
PROMETHEUS = "http://127.0.0.1:9090/api/v1"
STUB = "triton_python_backend_stub"
COMM = 15
"""Characters that the kernel keeps of a process's name."""


def docker(*arguments: str) -> list[str]:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


def make(verb: str) -> None:
    subprocess.run(["make", "--old-file=.venv/.installed", verb], cwd=ROOT, check=True)


@pytest.fixture(scope="module", autouse=True)
def stack() -> Iterator[None]:
    pulled = subprocess.run(["docker", "pull", "--quiet", "redis:7.4-bookworm"], check=False)
    if pulled.returncode:
        os.environ["COMPOSE_FILE"] = "docker-compose.yml:tests/containers/closed-network.yml"
    try:
        make("up")
        yield
    finally:
        make("down")
    assert docker("ps", "--all", "--quiet", "--filter", LABEL) == []
    assert docker("network", "ls", "--quiet", "--filter", LABEL) == []
    assert docker("volume", "ls", "--quiet", "--filter", LABEL) == []


def asked(path: str, **query: str) -> dict:
    return httpx.get(f"{PROMETHEUS}/{path}", params=query).raise_for_status().json()["data"]


def running(service: str) -> dict:
    name = docker(
        "ps",
        "--quiet",
        "--filter",
        LABEL,
        "--filter",
        f"label=com.docker.compose.service={service}",
    )[0]
    return json.loads("".join(docker("inspect", "--format", "{{json .}}", name)))


@pytest.mark.parametrize("service", ["triton-cpu", "redis", "prometheus"])
def test_every_service_is_healthy(service: str) -> None:
    """`make up` returns when each service is healthy."""
    assert running(service)["State"]["Health"]["Status"] == "healthy"


def test_the_server_has_no_rights_it_does_not_need() -> None:
    """It is not root, cannot write to its files, and listens on this machine alone."""
    triton = running("triton-cpu")
    assert triton["Config"]["User"] == "10001"
    assert triton["HostConfig"]["ReadonlyRootfs"]
    assert triton["HostConfig"]["CapDrop"] == ["ALL"]
    bound = [
        port["HostIp"]
        for ports in triton["NetworkSettings"]["Ports"].values()
        for port in ports or []
    ]
    assert bound == ["127.0.0.1"] * 3


def test_the_client_embeds_with_redis_as_its_cache() -> None:
    """A second program finds in Redis what the first one embedded."""
    config = {
        "models": {
            "server": {
                "provider": "triton",
                "model_id": "all-MiniLM-L6-v2",
                "url": "127.0.0.1:8001",
            }
        },
        "cache": {"memory_mb": None, "redis": {"url": "redis://127.0.0.1:6379/0"}},
    }
    texts = [f"text {number}" for number in range(200)]
    with Embedder(config=config) as first:
        fresh = first.embed(texts)
    with Embedder(config=config) as second:
        cached = second.embed(texts)
    assert not fresh.cached.any()
    assert cached.cached.all()
    assert (fresh.vectors == cached.vectors).all()


def test_prometheus_scrapes_triton_and_has_the_rules() -> None:
    """The server is a target that is up, its figures are there, and every rule evaluates."""
    deadline = time.monotonic() + 60
    while not asked("query", query='nv_inference_request_success{model="all-MiniLM-L6-v2"} > 0')[
        "result"
    ]:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert [target["health"] for target in asked("targets")["activeTargets"]] == ["up"]
    rules = [rule for group in asked("rules")["groups"] for rule in group["rules"]]
    file = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    written = [rule for group in file["groups"] for rule in group["rules"]]
    named = [rule.get("alert") or rule["record"] for rule in written]
    assert [rule["name"] for rule in rules] == named
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}


def kill(name: str, program: str) -> None:
    """SIGKILL of a program in a container."""
    processes = docker("top", name, "-eo", "pid,comm")
    os.kill(int(processes[processes.index(program[:COMM]) - 1]), signal.SIGKILL)


@pytest.mark.parametrize("program", [STUB, "tritonserver"])
def test_a_killed_process_is_there_again(program: str) -> None:
    """SIGKILL of a backend's process, then of Triton: the engine starts the container again, which
    becomes healthy, and clients reach it without a new setting. Its log says what happened.
    """
    triton = running("triton-cpu")
    before = triton["RestartCount"]
    kill(triton["Id"], program)
    deadline = time.monotonic() + 120
    while (triton := running("triton-cpu"))["RestartCount"] == before or (
        triton["State"]["Health"]["Status"] != "healthy"
    ):
        assert time.monotonic() < deadline, triton["State"]
        time.sleep(1)
    assert triton["RestartCount"] == before + 1
    with Embedder("127.0.0.1:8001") as embedder:
        assert embedder.embed(["back"]).dims == 384
    log = subprocess.run(["docker", "logs", triton["Id"]], capture_output=True, text=True)
    assert log.stderr.count(CHILD_DIED) == 1


@pytest.fixture(scope="module")
def nvidia() -> str:
    """An image in the place of NVIDIA's; tests/containers/nvidia.Dockerfile says what it is."""
    folder = ROOT / "tests" / "containers"
    name = "halimede/test-nvidia"
    docker(
        *["build", "--quiet", "--network=host", "--tag", name],
        *["--file", str(folder / "nvidia.Dockerfile"), str(folder)],
    )
    return name


def test_serve_in_nvidias_container(nvidia: str, settings: Settings) -> None:
    """`--runtime docker` as written, on the stand-in: it embeds what the wheel embeds, and ends,
    with a reason, when it has lost a process.
    """
    options = free_options()
    with container.serve(settings.repository, settings.python_backend, options, nvidia) as server:
        with Embedder(f"127.0.0.1:{options.grpc_port}") as embedder:
            vector = embedder.embed("hello world").vectors[0]
        assert vector[:3] == pytest.approx([-0.0345, 0.0310, 0.0067], abs=1e-4)
        [name] = docker("ps", "--quiet", "--filter", "label=halimede=triton")
        kill(name, STUB)
        deadline = time.monotonic() + 60
        while server.is_running():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert CHILD_DIED in server.exit_reason()


def test_the_gpu_image_in_a_cluster(nvidia: str, settings: Settings) -> None:
    """deploy/gpu.Dockerfile as written, on the stand-in and with a cluster's rights: its liveness
    probe succeeds, nobody controls its models, and it ends when it has lost a process.
    """
    image = "halimede/test-triton-gpu"
    docker(
        *["build", "--quiet", "--network=host", "--build-arg", f"BASE={nvidia}", "--tag", image],
        *["--file", "deploy/gpu.Dockerfile", str(ROOT)],
    )
    rights = ["--read-only", "--tmpfs=/tmp", "--user=10001", "--cap-drop=ALL", "--shm-size=1g"]
    models = ["--volume", f"{settings.repository}:/models:ro"]
    [name] = docker("run", "--detach", *rights, *models, "--publish=127.0.0.1::8000", image)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(["docker", "exec", name, *probes()["cluster"]]).returncode:
            assert time.monotonic() < deadline
            time.sleep(1)
        [http] = docker("port", name, "8000")
        refused = httpx.post(f"http://{http}/v2/repository/models/all-MiniLM-L6-v2/unload")
        assert refused.status_code == 403
        kill(name, STUB)
        assert docker("wait", name) == [str(128 + signal.SIGKILL)]
        log = subprocess.run(["docker", "logs", name], capture_output=True, text=True)
        assert CHILD_DIED in log.stderr
    finally:
        docker("rm", "--force", name)
