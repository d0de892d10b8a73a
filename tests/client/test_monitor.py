"""`halimede monitor` beside a real server."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import family
from typer.testing import CliRunner

from halimede import Embedder
from halimede.cli import app
from halimede.observability import monitor, server_memory
from halimede_ops.errors import HalimedeError, InvalidInput
from halimede_tools.serve.wheel import Server

GONE = "127.0.0.1:1"


def test_a_server_that_embeds_is_healthy_and_tells_its_figures(server: Server) -> None:
    """One line when a model is first seen; its probe and the server's shares are metrics."""
    lines: list[str] = []
    metrics_url = f"http://127.0.0.1:{server.options.metrics_port}/metrics"
    with Embedder(server.grpc_address) as embedder:
        watched = monitor.Monitor({"all-MiniLM-L6-v2": embedder}, metrics_url)
        exporter = monitor.serve_metrics(watched, "127.0.0.1", 0)
        try:
            monitor.watch(watched, 0.01, lines.append, rounds=3)
            while "machine_memory" not in watched.shares:  # Triton measures it every two seconds
                monitor.watch(watched, 0.2, lines.append, rounds=2)
            told = httpx.get(f"http://127.0.0.1:{exporter.server_port}/metrics").text
        finally:
            exporter.shutdown()
    assert len(lines) == 1
    assert lines[0].startswith("all-MiniLM-L6-v2: healthy, ")
    assert 'halimede_probe_healthy{model="all-MiniLM-L6-v2"} 1.0' in told
    assert 'halimede_probe_seconds{model="all-MiniLM-L6-v2"}' in told
    assert 'halimede_server_used_ratio{resource="memory"} 0.' in told
    assert 'halimede_server_used_ratio{resource="machine_memory"} 0.' in told


def test_the_memory_is_the_servers_own(server: Server) -> None:
    """Triton and its backends, what they share counted once; not the whole machine."""
    share = server_memory.share("localhost", server.options.metrics_port)
    assert share is not None
    used = share * server_memory.limit_bytes(server.process.pid)
    processes = family(server.process.pid)
    assert used == pytest.approx(sum(p.memory_full_info().pss for p in processes), rel=0.1)
    assert used < psutil.virtual_memory().used + psutil.virtual_memory().cached


def test_memory_of_what_is_no_triton_on_this_machine_is_unknown(server: Server) -> None:
    """Another machine, a port that nothing listens on, a program that forwards to a server."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert server_memory.share("127.0.0.1", other.getsockname()[1]) is None
    assert server_memory.share("127.0.0.1", 1) is None
    assert server_memory.share("192.0.2.1", server.options.metrics_port) is None
    assert server_memory.share("no-such-host.invalid", server.options.metrics_port) is None


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "2048000"}, 2_048_000),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "max"}, 4_096_000),
        ("0::/", {"memory.max": "1024000"}, 1_024_000),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "3072000"}, 3_072_000),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": f"{2**63}"}, 4_096_000),
        ("1:cpu:/a", {}, 4_096_000),
    ],
)
def test_the_limit_is_the_smallest_of_the_cgroups_and_the_machine(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int
) -> None:
    """Both versions of cgroups, at every level."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    for path, content in {"meminfo": "MemTotal:       4000 kB\n", "7/cgroup": cgroup}.items():
        (proc / path).parent.mkdir(parents=True, exist_ok=True)
        (proc / path).write_text(content)
    for path, content in limits.items():
        (cgroups / path).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / path).write_text(f"{content}\n")
    assert server_memory.limit_bytes(7, proc, cgroups) == expected


def test_a_server_that_is_gone_is_unhealthy() -> None:
    """The line says why; the metric is 0; its figures are left out."""
    with Embedder(GONE, timeout_s=30) as embedder:
        watched = monitor.Monitor({"m": embedder}, f"http://{GONE}/metrics")
        [line] = watched.probe()
        assert list(watched.probe()) == []
        [healthy, *_] = watched.collect()
    assert line.startswith("m: unhealthy: no Triton answers at")
    assert healthy.samples[0].value == 0
    assert watched.shares == {}


def test_memory_above_nine_tenths_is_unhealthy(server: Server) -> None:
    """A probe in time does not excuse a server that is about to be killed for its memory."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"nv_cpu_memory_used_bytes 95\nnv_cpu_memory_total_bytes 100\nnv_cpu_utilization 0.5\n"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    simulated = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=simulated.serve_forever, daemon=True).start()
    try:
        with Embedder(server.grpc_address) as embedder:
            watched = monitor.Monitor({"m": embedder}, f"http://127.0.0.1:{simulated.server_port}/")
            assert list(watched.probe()) == ["m: unhealthy: 95% of the machine's memory is used"]
    finally:
        simulated.shutdown()
    assert watched.shares == {"machine_memory": 0.95, "machine_cpu": 0.5}


def test_a_full_machine_does_not_make_a_small_server_unhealthy(server: Server) -> None:
    """What counts is the server's own memory, where it is known."""
    with Embedder(server.grpc_address) as embedder:
        watched = monitor.Monitor({"m": embedder}, None)
        report = {"healthy": True, "latency_ms": 1.0}
        watched.shares = {"memory": 0.2, "machine_memory": 0.95}
        assert watched._with_memory(report) == report
        watched.shares = {"memory": 0.92, "machine_memory": 0.95}
        assert watched._with_memory(report)["error"] == "92% of the server's memory is used"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--every-s", "-1"], "every_s is -1; give seconds above 0."),
        (["--every-s", "0"], "every_s is 0; give seconds above 0."),
        (["--every-s", "nan"], "every_s is nan; give seconds above 0."),
        (["--every-s", "inf"], "every_s is inf; give seconds above 0."),
        (["--rounds", "0"], "rounds is 0; give 1 or more."),
        (["--port", "70000"], "port is 70000; give 1 to 65535, or 0 for any free port."),
        (["--port", "-1"], "port is -1; give 1 to 65535, or 0 for any free port."),
    ],
)
def test_an_interval_or_port_that_cannot_be_is_refused(options: list[str], error: str) -> None:
    """Before anything is sent; `--every-s -1` probed without a pause."""
    result = CliRunner().invoke(app, ["monitor", "--url", GONE, *options])
    assert isinstance(result.exception, InvalidInput)
    assert str(result.exception) == error


@pytest.mark.parametrize("url", ["http://127.0.0.1:70000/metrics", "127.0.0.1:8002", "http://", ""])
def test_a_metrics_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="give one such as http://127.0.0.1:8002/metrics"):
        monitor.Monitor({}, url)


def test_a_taken_port_is_one_plain_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(HalimedeError, match="cannot be listened on"):
            monitor.serve_metrics(monitor.Monitor({}, None), "127.0.0.1", taken.getsockname()[1])
