"""Upgrades of the chart: what a cluster would have to refuse, and a rollout with real servers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import charts
import pytest
from conftest import MODEL, free_options

from halimede_tools.serve import options as serve_options
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

JITTER = 1.1
"""gRPC spreads the age of connections by 10 %."""
DNS_TTL_S = 30
"""Longest time that a cluster's DNS, or a node's cache of it, gives an old answer."""
READY_S = 10
"""Period and failures of the readiness probe, and what the cluster needs to tell it."""
CALLER = Path(__file__).parent / "rollout_caller.py"
IMMUTABLE: dict[str, tuple[str, ...]] = {
    "Deployment": ("spec", "selector"),
    "Job": ("spec", "template"),
    "PersistentVolumeClaim": ("spec",),
    "Service": ("spec", "clusterIP"),
}
"""Kind → field that Kubernetes refuses to change."""
UPGRADES: list[dict[str, Any]] = [
    {},
    {"model": "bge-small-en-v1.5"},
    {"triton": {"device": "gpu"}},
    {"redis": {"enabled": True}, "autoscaling": {"engine": "keda"}},
]


@pytest.fixture(scope="module")
def next_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as its next version."""
    chart = tmp_path_factory.mktemp("next") / "halimede"
    shutil.copytree(charts.CHART, chart)
    text = (chart / "Chart.yaml").read_text()
    text = re.sub(r"^(version|appVersion): .*", r"\1: 9.9.9", text, flags=re.M)
    (chart / "Chart.yaml").write_text(text)
    return chart


def by_name(manifests: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in manifests}


def field(manifest: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        manifest = manifest.get(name, {})
    return manifest


@pytest.mark.parametrize("values", UPGRADES, ids=["version", "model", "gpu", "redis, keda"])
def test_an_upgrade_changes_only_what_can_be_changed(
    next_chart: Path, values: dict[str, Any]
) -> None:
    """To the next version, with these values: no object keeps its name and changes a field that
    Kubernetes refuses to change.
    """
    before = by_name(charts.rendered())
    after = by_name(charts.rendered(values, chart=next_chart))
    for name in before.keys() & after.keys():
        path = IMMUTABLE.get(name[0])
        if path is not None:
            assert field(before[name], path) == field(after[name], path), name
    jobs = {name for name in before.keys() | after.keys() if name[0] == "Job"}
    assert len(jobs) == 2


def test_a_version_alone_changes_the_pods_of_its_own_images(next_chart: Path) -> None:
    """The next version replaces the pods of Triton and of the gateway, and leaves Redis as it is."""
    values = {"redis": {"enabled": True}}
    before, after = (
        {
            name: one["spec"]["template"]
            for (kind, name), one in found.items()
            if kind == "Deployment"
        }
        for found in (
            by_name(charts.rendered(values)),
            by_name(charts.rendered(values, chart=next_chart)),
        )
    )
    assert {name for name in before if before[name] != after[name]} == {"triton", "gateway"}
    for name in ("triton", "gateway"):
        for template in (before[name], after[name]):
            del template["spec"]["containers"][0]["image"]
        assert before[name] == after[name]


def deployment(name: str) -> dict[str, Any]:
    return by_name(charts.rendered())["Deployment", name]["spec"]


def drain_s(name: str) -> int:
    [container] = deployment(name)["template"]["spec"]["containers"]
    [program, seconds] = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return int(seconds)


def test_a_server_answers_until_its_clients_have_left() -> None:
    """Triton stops after every connection has been renewed once since DNS forgot the server; no
    server ends before the next one is ready.
    """
    renewed_s = serve_options.CONNECTION_AGE_MS / 1000 * JITTER
    assert drain_s("triton") >= renewed_s + DNS_TTL_S
    assert drain_s("gateway") >= READY_S
    for name in ("triton", "gateway"):
        spec = deployment(name)
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= drain_s(name) + 50


class Rollout:
    """Two servers behind one name, replaced as Kubernetes replaces the pods of a Deployment."""

    def __init__(self, folder: Path, servers: contextlib.ExitStack) -> None:
        self.folder = folder
        self.servers = servers
        self.hosts = folder / "hosts"
        self.options = free_options(models=(MODEL,))
        self.addresses: list[str] = []
        self.leaving: list[threading.Thread] = []
        self.publish()

    def publish(self) -> None:
        """Give the name the addresses of the servers that are ready."""
        lines = ["127.0.0.1 localhost", *(f"{address} triton-grpc" for address in self.addresses)]
        self.hosts.write_text("\n".join(lines) + "\n")

    def start(self, address: str) -> tuple[str, wheel.Server]:
        settings = Settings()
        run = self.folder / address
        run.mkdir()
        options = self.options.model_copy(update={"host": address})
        serving = wheel.serve(settings.repository, settings.python_backend, run, options)
        server = self.servers.enter_context(serving)
        self.addresses.append(address)
        self.publish()
        return address, server

    def end(self, address: str, server: wheel.Server, drain_s: float) -> None:
        """Take a server out of DNS, which some ask a little later; then stop it."""

        def leave() -> None:
            time.sleep(5)
            self.addresses.remove(address)
            self.publish()
            time.sleep(drain_s - 5)
            server.stop()

        self.leaving.append(threading.Thread(target=leave))
        self.leaving[-1].start()


@pytest.fixture
def rollout(tmp_path: Path) -> Iterator[Rollout]:
    with contextlib.ExitStack() as servers:
        yield Rollout(tmp_path, servers)


@pytest.mark.faults
def test_no_request_fails_while_every_server_is_replaced(rollout: Rollout) -> None:
    """With the chart's own times, real servers, and a name whose addresses change: 8 callers get an
    answer to every request.
    """
    old = [rollout.start(f"127.0.0.{number}") for number in (11, 12)]
    port = rollout.options.grpc_port
    caller = [sys.executable, str(CALLER), f"triton-grpc:{port}", MODEL]
    mount = f'mount --bind {rollout.hosts} /etc/hosts && exec "$@"'
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *caller],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "asking\n"
    for number, (address, server) in enumerate(old, 21):
        rollout.start(f"127.0.0.{number}")
        rollout.end(address, server, drain_s("triton"))
    for thread in rollout.leaving:
        thread.join()
    time.sleep(5)
    printed, _ = process.communicate("", timeout=60)
    found = json.loads(printed)
    print(found["answers"], "requests")
    assert found["errors"] == {} and found["answers"] > 1000
