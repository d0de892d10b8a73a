"""`halimede monitor` beside a real server."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from halimede import Embedder
from halimede.observability import monitor
from halimede_ops.errors import HalimedeError
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
            while "memory" not in watched.shares:  # Triton measures it every two seconds
                monitor.watch(watched, 0.2, lines.append, rounds=2)
            told = httpx.get(f"http://127.0.0.1:{exporter.server_port}/metrics").text
        finally:
            exporter.shutdown()
    assert len(lines) == 1
    assert lines[0].startswith("all-MiniLM-L6-v2: healthy, ")
    assert 'halimede_probe_healthy{model="all-MiniLM-L6-v2"} 1.0' in told
    assert 'halimede_probe_seconds{model="all-MiniLM-L6-v2"}' in told
    assert 'halimede_server_used_ratio{resource="memory"} 0.' in told


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
            assert list(watched.probe()) == ["m: unhealthy: 95% of the memory is used"]
    finally:
        simulated.shutdown()
    assert watched.shares == {"memory": 0.95, "cpu": 0.5}


def test_a_taken_port_is_one_plain_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(HalimedeError, match="cannot be listened on"):
            monitor.serve_metrics(monitor.Monitor({}, None), "127.0.0.1", taken.getsockname()[1])
