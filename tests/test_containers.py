"""The CPU stack of docker-compose.yml, really run: `make test-containers`."""

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

from halimede import Embedder
from tools.watch import TOLD

pytestmark = pytest.mark.containers

ROOT = Path(__file__).resolve().parents[1]
LABEL = "label=com.docker.compose.project=halimede"
PROMETHEUS = "http://127.0.0.1:9090/api/v1"
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


def container(service: str) -> dict:
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
    """`make up` returns when each service says that it is healthy."""
    assert container(service)["State"]["Health"]["Status"] == "healthy"


def test_the_server_has_no_rights_it_does_not_need() -> None:
    """It is not root, cannot write to its files, and listens on this machine alone."""
    triton = container("triton-cpu")
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


def kill(program: str) -> int:
    """How often the engine had started Triton's container again before this SIGKILL in it."""
    triton = container("triton-cpu")
    processes = docker("top", triton["Id"], "-eo", "pid,comm")
    os.kill(int(processes[processes.index(program[:COMM]) - 1]), signal.SIGKILL)
    return triton["RestartCount"]


@pytest.mark.parametrize("program", ["triton_python_backend_stub", "tritonserver"])
def test_a_killed_process_is_there_again(program: str) -> None:
    """SIGKILL of a backend's process, then of Triton: the engine starts the container again, which
    becomes healthy, and clients reach it without a new setting. Its log says what happened.
    """
    before = kill(program)
    deadline = time.monotonic() + 120
    while (triton := container("triton-cpu"))["RestartCount"] == before or (
        triton["State"]["Health"]["Status"] != "healthy"
    ):
        assert time.monotonic() < deadline, triton["State"]
        time.sleep(1)
    assert triton["RestartCount"] == before + 1
    with Embedder("127.0.0.1:8001") as embedder:
        assert embedder.embed(["back"]).dims == 384
    log = subprocess.run(["docker", "logs", triton["Id"]], capture_output=True, text=True)
    assert log.stderr.count(TOLD) == 1
