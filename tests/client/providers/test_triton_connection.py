"""Connections to Triton: addresses, proxies, and what servers that are not Triton answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest
from conftest import MODEL

from halimede import Embedder, HalimedeError, InvalidInput, ModelNotFound, ServerError
from halimede.providers.triton.connection import Tls, parse
from halimede.providers.triton.grpc_connection import GrpcConnection
from halimede_ops import errors
from halimede_tools.serve import ports, wheel

PAGE = b"<html><body>s3cret words of a gateway</body></html>"


@contextlib.contextmanager
def answering(status: int, body: bytes = PAGE, **headers: str) -> Iterator[str]:
    """The address of a server that gives the same answer to everything."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_CONNECT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def failure(url: str, **more: Any) -> HalimedeError:
    model = {"provider": "triton", "model_id": MODEL, "url": url, "retries": 0, "timeout": 20}
    with Embedder(config={"models": {"m": {**model, **more}}}) as embedder:
        with pytest.raises(HalimedeError) as raised:
            embedder.embed("a text")
    assert "s3cret" not in str(raised.value)
    assert "<" not in str(raised.value)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("host:8001", ("grpc", "host:8001", "")),
        ("host", ("grpc", "host:8001", "")),
        ("grpc://host", ("grpc", "host:8001", "")),
        ("grpcs://host", ("grpcs", "host:443", "")),
        ("http://host", ("http", "host:80", "")),
        ("https://host/", ("https", "host:443", "")),
        ("http://host:8000/prefix/", ("http", "host:8000", "/prefix")),
        ("https://host/a/b", ("https", "host:443", "/a/b")),
        ("[::1]:8001", ("grpc", "[::1]:8001", "")),
        ("http://[::1]:8000", ("http", "[::1]:8000", "")),
        ("127.0.0.1:65535", ("grpc", "127.0.0.1:65535", "")),
    ],
)
def test_an_address_is_understood(url: str, expected: tuple[str, str, str]) -> None:
    """Protocol, host with its port or the protocol's, and the path in front of every request."""
    assert parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        ":8001",
        "host:",
        "host:0",
        "host:99999",
        "host:-1",
        "host:port",
        "::1:8001",
        "[::1",
        "ftp://host:1",
        "http://",
        "http:///path",
        "grpc://host:8001/prefix",
        "host:8001/prefix",
        "http://host:8000/?query",
        "http://host:8000/#part",
        "a host:8001",
        "user:s3cret@host:8001",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """In one line that says what to give, in the program and in a configuration."""
    if url == "host:":  # without a number it is the default port
        assert parse(url).host == "host:8001"
        return
    with pytest.raises(InvalidInput) as raised:
        parse(url)
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)
    with pytest.raises(InvalidInput):
        Embedder(url)


def test_a_prefix_is_part_of_every_request(server: wheel.Server) -> None:
    """Behind a gateway that serves Triton under a path, the client works under that path alone."""
    import httpx

    asked: list[str] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.removeprefix("/models/triton")
            answer = httpx.request(
                self.command,
                f"http://{server.http_address}{path}",
                content=content,
                headers={k: v for k, v in self.headers.items() if k.startswith("Inference")},
            )
            self.send_response(answer.status_code)
            for name in ("Inference-Header-Content-Length", "Content-Type"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    gateway = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=gateway.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{gateway.server_port}/models/triton/"
        with Embedder(address, MODEL) as embedder:
            assert embedder.embed(["a", "b"]).dims == 384
    finally:
        gateway.shutdown()
        gateway.server_close()
    assert asked
    assert all(path.startswith("/models/triton/v2/") for path in asked)


RETRYABLE = {408, 409, 423, 425, 429, 500, 502, 503, 504, 529}


@pytest.mark.parametrize(
    "status", [301, 302, 400, 401, 403, 404, 405, 407, 408, 409, 410, 413, 418, 421, 422, 423, 425,
               426, 428, 429, 431, 451, 500, 501, 502, 503, 504, 505, 507, 511, 520, 529, 599],
)  # fmt: skip
def test_every_status_of_a_gateway_has_its_class(status: int) -> None:
    """A typed error, retryable where a retry can help, without a word of the body."""
    with answering(status, Retry_After="7") as address:
        error = failure(f"http://{address}")
    assert type(error) is not HalimedeError or not error.retryable
    if status in RETRYABLE:
        assert error.retryable, error
        assert isinstance(error, ServerError)
    if 400 <= status < 500 and status not in RETRYABLE or status < 400:
        assert not error.retryable, error
    if status in (429, 503):
        assert error.retry_after_s == 7


@pytest.mark.parametrize("body", [PAGE, b"", b"{}", b"[]", b"null", b'{"name": 1', b"\xff\xfe"])
def test_a_200_that_is_not_tritons_is_said_to_be_none(body: bytes) -> None:
    """Such as a login page, an empty body, or another service's JSON."""
    with answering(200, body) as address:
        error = failure(f"http://{address}")
    assert "not a Triton server's HTTP port" in str(error)
    assert not error.retryable


def test_other_ports_are_named(server: wheel.Server) -> None:
    """gRPC on the HTTP port, HTTP on the gRPC port, and the metrics port: each says what to do."""
    metrics = f"127.0.0.1:{server.options.metrics_port}"
    for url in (
        server.http_address,
        f"http://{server.grpc_address}",
        f"http://{metrics}",
        metrics,
    ):
        error = failure(url)
        assert "not a Triton server's" in str(error), (url, error)
        assert "8000 for http://, 8001 for grpc://" in str(error)


def test_a_model_that_is_not_there_is_not_a_wrong_port(server: wheel.Server) -> None:
    """Triton's own 404 stays ModelNotFound, over both protocols."""
    for url in (server.grpc_address, f"http://{server.http_address}"):
        with Embedder(url, "no-such-model") as embedder, pytest.raises(ModelNotFound):
            embedder.embed("a")


@contextlib.contextmanager
def failing(code: grpc.StatusCode, details: str) -> Iterator[str]:
    """The address of a gRPC server that fails every request with a status."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(code, details)
            )

    running = grpc.server(futures.ThreadPoolExecutor(2), handlers=[Handler()])
    [port] = ports.free_ports(1)
    running.add_insecure_port(f"127.0.0.1:{port}")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.stop(None)


EXPECTED = {
    "CANCELLED": errors.ServerUnreachable,
    "UNKNOWN": errors.ServerError,
    "INVALID_ARGUMENT": errors.InvalidInput,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "NOT_FOUND": errors.ModelNotFound,
    "PERMISSION_DENIED": errors.AccessDenied,
    "RESOURCE_EXHAUSTED": errors.OutOfMemory,
    "ABORTED": errors.ServerError,
    "OUT_OF_RANGE": errors.InvalidInput,
    "UNIMPLEMENTED": errors.HalimedeError,
    "INTERNAL": errors.ServerError,
    "UNAVAILABLE": errors.ServerUnreachable,
    "DATA_LOSS": errors.ServerError,
    "UNAUTHENTICATED": errors.AccessDenied,
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"])
def test_every_grpc_status_has_its_class(code: grpc.StatusCode) -> None:
    """As for HTTP; the words of a proxy are not repeated."""
    says = "" if code.name in ("INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE") else "s3cret"
    with failing(code, says) as address:
        error = failure(address)
    assert type(error) is EXPECTED.get(code.name, HalimedeError)


def test_a_server_that_stops_is_no_missing_model() -> None:
    """Triton unloads its models before it closes its connections: another server may have them."""
    says = "Request for unknown model: 'm' has no available versions"
    with failing(grpc.StatusCode.NOT_FOUND, says) as address:
        error = failure(address)
    assert type(error) is errors.ServerUnreachable


def test_loopback_is_never_proxied(server: wheel.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a proxy in the environment that answers nothing, this machine's servers are reached."""
    [dead] = ports.free_ports(1)
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{dead}")
    for url in (server.grpc_address, f"http://{server.http_address}"):
        with Embedder(url, MODEL) as embedder:
            assert embedder.embed("a").dims == 384


@pytest.mark.parametrize("url", ["192.0.2.1:8001", "http://192.0.2.1:8000"])
def test_a_proxy_that_fails_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which proxy was asked, without its password; with no_proxy it is not asked."""
    with answering(502) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://user:s3cret@{proxy}")
        error = failure(url, timeout=5)
        assert error.retryable
        assert proxy in str(error), error
        monkeypatch.setenv("no_proxy", "192.0.2.1")
        assert proxy not in str(failure(url, timeout=1))


def test_a_server_that_never_answers_ends_in_time() -> None:
    """A port that accepts and says nothing: DeadlineExceeded over both protocols."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for url in (address, f"http://{address}"):
            assert isinstance(failure(url, timeout=1), errors.ServerError)


class CutOff:
    """A stub whose calls are cut off by Ctrl-C while they are made."""

    def __getattr__(self, _: str) -> Any:
        return self

    def future(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_closing_does_not_wait_for_a_call_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can cut gRPC off while it makes a call; its channel then waits for that call for ever,
    and close() for two seconds.
    """
    never = threading.Event()
    monkeypatch.setattr(grpc._channel.Channel, "close", lambda _: never.wait())
    connection = GrpcConnection(parse("127.0.0.1:1"), Tls())
    connection._open()
    monkeypatch.setattr(connection, "_stub", CutOff())
    with pytest.raises(KeyboardInterrupt):
        connection.start("ModelInfer", None, 1)
    connection.close()
    assert not never.is_set()
    never.set()
