"""The edge: bounds, request ids, pinned spaces, health, metrics, the access log and traces."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MODEL, wait_until
from gateways import command, gateway, triton_model
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client.parser import text_string_to_metric_families
from test_gateway_keys import NOBODY, SHAPES, message

from halimede.gateway.dialects.dialect import dialect_at
from halimede.gateway.edge import protocol
from halimede_tools.serve import wheel

SECRET_TEXT = "the text that no log may hold"
BODY = {"model": MODEL, "input": SECRET_TEXT}
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n"
LARGE = b'{"model": "m", "input": "' + b"a" * 2**20 + b'"}'


@pytest.fixture(scope="module")
def bounded(server: wheel.Server) -> Iterator[httpx.Client]:
    """A gateway with low bounds for bodies, whose model's server does not answer."""
    options = {
        "max_body_mib": 0.5,
        "body_timeout": 1,
        "kserve_url": f"http://{server.http_address}",
    }
    with (
        gateway(NOBODY, **options) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def narrow() -> Iterator[httpx.Client]:
    """A gateway that answers two requests at a time."""
    with (
        gateway(NOBODY, max_requests=2) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


@contextlib.contextmanager
def connection(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port), 60) as opened:
        yield opened


def rest(opened: socket.socket) -> bytes:
    """What comes until the gateway closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := opened.recv(2**16):
            found += part
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("has_length", [True, False])
def test_a_large_body_is_refused(bounded: httpx.Client, name: str, has_length: bool) -> None:
    """413 in the dialect's shape: by its Content-Length, or by what comes."""
    shape = SHAPES[name]
    assert dialect_at(shape.path).name == name
    parts = (LARGE[i : i + 2**16] for i in range(0, len(LARGE), 2**16))
    answer = bounded.post(shape.path, content=LARGE if has_length else parts)
    assert answer.status_code == 413
    assert "0.5 MiB" in message(shape, answer)


@pytest.mark.parametrize("name", SHAPES)
def test_a_slow_body_is_refused(bounded: httpx.Client, name: str) -> None:
    """408 in the dialect's shape, and the connection ends."""
    shape = SHAPES[name]
    with connection(bounded) as opened:
        opened.sendall(f"POST {shape.path} HTTP/1.1\r\nHost: a\r\n".encode())
        opened.sendall(b'Content-Length: 100\r\n\r\n{"model"')
        head, _, body = rest(opened).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "did not arrive" in message(shape, httpx.Response(408, content=body))


@pytest.mark.parametrize("name", SHAPES)
def test_overload_is_refused(narrow: httpx.Client, name: str) -> None:
    """429 with Retry-After: 1 beyond `max_requests`; probes are answered."""
    shape = SHAPES[name]
    with connection(narrow) as one, connection(narrow) as other:
        for opened in (one, other):
            opened.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        wait_until(lambda: "in_flight 2.0" in narrow.get("/metrics").text)
        answer = narrow.post(shape.path, json=shape.body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert "overloaded" in message(shape, answer)
        assert narrow.get("/health/live").status_code == 200
    wait_until(lambda: "in_flight 0.0" in narrow.get("/metrics").text)


def test_a_client_that_leaves_is_no_error(
    narrow: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted as 4xx, and nothing is logged as failed."""
    caplog.set_level(logging.INFO, "halimede.gateway")
    with connection(narrow) as opened:
        opened.sendall(HEAD + b"X-Request-Id: left\r\nContent-Length: 100\r\n\r\n{")
        wait_until(lambda: "in_flight 1.0" in narrow.get("/metrics").text)
    wait_until(lambda: any('"left"' in record.message for record in caplog.records))
    [entry] = [json.loads(r.message) for r in caplog.records if '"left"' in r.message]
    assert entry["status"] == 499
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.2)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("given", [b"", b"\r\n", b"POST /v1", HEAD, HEAD + b"Name: val"])
def test_a_slow_head_ends_the_connection(bounded: httpx.Client, given: bytes) -> None:
    """408, also if nothing was sent at all."""
    with connection(bounded) as opened:
        opened.sendall(given)
        assert rest(opened).startswith(b"HTTP/1.1 408 ")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("given", [b"\r\n", b"POST /v1", HEAD, HEAD + b"Name: val"])
def test_a_slow_later_head_ends_the_connection(bounded: httpx.Client, given: bytes) -> None:
    """408 once it was begun; a connection without a request stays open longer."""
    with connection(bounded) as opened:
        opened.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert opened.recv(2**16).startswith(b"HTTP/1.1 200 ")
        opened.sendall(given)
        assert rest(opened).startswith(b"HTTP/1.1 408 ")


@pytest.mark.usefixtures("hasty")
def test_a_slow_rest_of_a_refused_body_ends_the_connection(bounded: httpx.Client) -> None:
    """Nobody reads it, but it is not waited for either."""
    with connection(bounded) as opened:
        opened.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n")
        assert opened.recv(2**16).startswith(b"HTTP/1.1 404 ")
        opened.sendall(b"a")
        assert rest(opened).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nName: ",
        b"",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nName: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;",
    ],
    ids=["url", "header", "line ends", "trailer", "chunk extension"],
)
def test_a_gigantic_head_ends_the_connection(bounded: httpx.Client, start: bytes) -> None:
    """So does what surrounds the parts of a body."""
    part = b"\r\n" * 2**15 if not start else b"a" * 2**16
    sent = 0
    with connection(bounded) as opened, contextlib.suppress(ConnectionError):
        opened.sendall(start)
        for _ in range(1000):
            sent += opened.send(part)
    assert sent < 1000 * len(part)
    assert bounded.get("/health/live").status_code == 200


def test_many_slow_clients_harm_nobody(bounded: httpx.Client) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            opened = stack.enter_context(connection(bounded))
            opened.sendall(b"POST /v1/emb")
        assert bounded.get("/health/live").status_code == 200


@pytest.mark.parametrize("given", ["a", "an id of 30 characters, or so", "x" * 128])
def test_a_request_id_is_taken_over(bounded: httpx.Client, given: str) -> None:
    for answer in (
        bounded.get("/health/live", headers={"x-request-id": given}),
        bounded.post("/nowhere", headers={"x-request-id": given}),
        bounded.post("/v1/embeddings", content="{", headers={"x-request-id": given}),
    ):
        assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "ä", "a\tb"])
def test_a_request_id_is_made(bounded: httpx.Client, given: str | None) -> None:
    """Where there is none, or one that is too long or cannot be printed."""
    headers = {} if given is None else {"x-request-id": given.encode()}
    answer = bounded.get("/health/live", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("given", ["", "a", "0" * 15, "0" * 17, "g" * 16])
def test_a_space_is_16_hex_digits(bounded: httpx.Client, name: str, given: str) -> None:
    shape = SHAPES[name]
    answer = bounded.post(shape.path, json=shape.body, headers={"halimede-space": given})
    assert answer.status_code == 400
    assert "16 hex digits" in message(shape, answer)


def test_an_answer_of_another_space_is_refused(http: httpx.Client) -> None:
    """409; the space of the answer itself is accepted, in either case."""
    space = http.post("/v1/embeddings", json=BODY).headers["halimede-space"]
    for given, status in ((space, 200), (space.upper(), 200), ("0" * 16, 409)):
        answer = http.post("/v1/embeddings", json=BODY, headers={"halimede-space": given})
        assert answer.status_code == status
    assert space in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_ready_while_the_default_model_answers(http: httpx.Client) -> None:
    assert http.get("/health/ready").status_code == 200
    assert http.get("/health/live").status_code == 200


def test_not_ready_while_its_server_does_not_answer() -> None:
    """503 also if it accepts connections; a probe does not wait for the model's time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        model = {"provider": "triton", "model_id": "m", "url": url, "timeout_s": 300}
        with gateway({"m": model}) as address:
            for _ in range(3):
                answer = httpx.get(f"{address}/health/ready", timeout=60)
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
            assert httpx.get(f"{address}/health/live", timeout=60).status_code == 200


def test_cors_is_off_by_default(bounded: httpx.Client) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        bounded.get("/health/live", headers=asked),
        bounded.options("/v1/embeddings", headers=asked),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_for_origins() -> None:
    """Pages of these origins may ask and read our headers, those of others may not."""
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    with gateway(NOBODY, cors_origins=["https://app.example"]) as address:
        before = httpx.options(f"{address}/v1/embeddings", headers=asked)
        answer = httpx.post(f"{address}/v1/embeddings", headers=asked, content="{")
        other = {**asked, "Origin": "https://other.example"}
        refused = httpx.options(f"{address}/v1/embeddings", headers=other)
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    exposed = answer.headers["access-control-expose-headers"]
    assert {"halimede-space", "x-ratelimit-remaining-tokens"} <= set(exposed.split(", "))
    assert "access-control-allow-origin" not in refused.headers


def metrics(address: str | httpx.URL) -> dict[tuple[str, ...], float]:
    """Name and values of the labels → value, without the `_created` of counters."""
    text = httpx.get(f"{str(address).rstrip('/')}/metrics", timeout=60).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_answered(server: wheel.Server) -> None:
    """By dialect, key, model and class of status; a model that is not served is no label."""
    with gateway(triton_model(server)) as address, httpx.Client(base_url=address) as client:
        long = "word " * 10_000
        answer = client.post("/v1/embeddings", json={**BODY, "input": ["a", long]}, timeout=60)
        client.post("/v1/embeddings", json={**BODY, "model": SECRET_TEXT})
        client.post("/v1/embeddings", content="{")
        client.get(f"/{'/'.join('abcdef')}")
        found = metrics(address)
        prefix = "halimede_gateway"
        assert found[f"{prefix}_requests_total", "openai", "", MODEL, "2xx"] == 1
        assert found[f"{prefix}_requests_total", "openai", "", "", "4xx"] == 3
        assert found[f"{prefix}_inputs_total", "openai", "", MODEL] == 2
        tokens = answer.json()["usage"]["total_tokens"]
        assert found[f"{prefix}_tokens_total", "openai", "", MODEL] == tokens
        assert found[f"{prefix}_truncated_total", "openai", "", MODEL] == 1
        assert found[f"{prefix}_seconds_count", "openai", MODEL, "2xx"] == 1
        assert found[(f"{prefix}_in_flight",)] == 0
        assert SECRET_TEXT not in str(found)


def test_the_access_log_has_no_text(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """One line of JSON a request, with the template of its path."""
    caplog.set_level(logging.INFO, "halimede.gateway")
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"x-request-id": "one", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    answer = http.post("/v1/embeddings", json=BODY, headers=headers)
    http.get(f"/v1/models/{SECRET_TEXT}?{SECRET_TEXT}")
    http.get(f"/{SECRET_TEXT}")
    wait_until(lambda: len(caplog.records) >= 3)
    entries = [json.loads(record.message) for record in caplog.records]
    [first] = [entry for entry in entries if entry["request_id"] == "one"]
    assert first.pop("ms") > 0
    assert first.pop("time")
    assert first == {
        "request_id": "one",
        "method": "POST",
        "route": "/v1/embeddings",
        "status": 200,
        "dialect": "openai",
        "model": MODEL,
        "inputs": 1,
        "tokens": answer.json()["usage"]["total_tokens"],
        "truncated": 0,
        "trace_id": trace,
    }
    assert "/v1/models/{name:path}" in {entry.get("route") for entry in entries}
    assert not any(SECRET_TEXT in record.message for record in caplog.records)


def test_an_error_of_ours_is_logged_without_a_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """500 in the dialect's shape with the request id; the log has the class and the place."""
    from fastapi.testclient import TestClient

    from halimede.config.resolve import resolve
    from halimede.gateway.app import create

    app = create(resolve({"models": NOBODY}))

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError(SECRET_TEXT)

    answer = TestClient(app).get("/broken", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["code"] == "server_error"
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "RuntimeError" in record.message
    assert "in broken" in record.message
    assert SECRET_TEXT not in caplog.text + answer.text


def test_caller_gateway_and_client_are_one_trace(
    http: httpx.Client, tracers: TracerProvider
) -> None:
    """The caller's span is above the gateway's, and that above the client's."""
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    tracers.add_span_processor(processor)
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    try:
        http.post("/v1/embeddings", json=BODY, headers=headers)
        http.get("/v1/models/none", headers=headers)
        wait_until(lambda: len([s for s in exporter.get_finished_spans() if s.parent]) >= 3)
        spans = {span.name: span for span in exporter.get_finished_spans()}
    finally:
        processor.shutdown()
    ours, inner = spans["POST /v1/embeddings"], spans["halimede.embed"]
    assert ours.kind is SpanKind.SERVER
    assert (ours.context.trace_id, inner.context.trace_id) == (int(trace_id, 16),) * 2
    assert ours.parent.span_id == int(parent_id, 16)
    assert inner.parent.span_id == ours.context.span_id
    assert ours.attributes["http.response.status_code"] == 200
    assert ours.attributes["halimede.model"] == MODEL
    assert spans["GET /v1/models/{name:path}"].attributes["http.response.status_code"] == 404
    assert not any(SECRET_TEXT in span.to_json() for span in exporter.get_finished_spans())


def test_workers_share_their_metrics(server: wheel.Server, tmp_path: Path) -> None:
    """/metrics of any worker has the sums of all; the log has one line for each request."""
    count = 20
    with command(tmp_path, triton_model(server), "--workers", "2") as (address, process):
        for _ in range(count):
            answer = httpx.post(f"{address}/v1/embeddings", json=BODY, timeout=60)
            assert answer.status_code == 200
        for _ in range(4):
            found = metrics(address)
            name = "halimede_gateway_requests_total"
            assert found[name, "openai", "", MODEL, "2xx"] == count
            assert found[("halimede_gateway_in_flight",)] == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    lines = (tmp_path / "log").read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    assert len([entry for entry in entries if entry.get("route") == "/v1/embeddings"]) == count
    assert SECRET_TEXT not in str(lines)


def test_the_access_log_can_be_off(tmp_path: Path) -> None:
    with command(tmp_path, NOBODY, "--no-access-log") as (address, _):
        httpx.get(f"{address}/nowhere")
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_an_offer_to_upgrade_is_ignored(http: httpx.Client) -> None:
    """Java's client offers HTTP/2 with each request."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAA"}
    assert http.get("/health/live", headers=headers).status_code == 200
    assert http.post("/v1/embeddings", json=BODY, headers=headers).status_code == 200
    with connection(http) as opened:
        body = json.dumps(BODY).encode()
        opened.sendall(HEAD + b"Connection: close, upgrade\r\nupgrade: h2c\r\n")
        opened.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        assert rest(opened).startswith(b"HTTP/1.1 200 ")


def test_lists_in_bodies_are_bounded() -> None:
    """A list ends at its first error: one error an item took a thousand times the memory."""
    from pydantic import ValidationError

    from halimede.gateway.dialects.dialect import BODIES
    from halimede.gateway.dialects.openai import EmbeddingsRequest

    for kind in BODIES:
        for part in parts(kind.model_json_schema()):
            assert part.get("type") != "array" or "maxItems" in part, kind
    with pytest.raises(ValidationError) as error:
        EmbeddingsRequest.model_validate({"model": "m", "input": [1.5] * 100_000})
    assert error.value.error_count() < 10


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it."""
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, (dict, list)):
            yield from parts(part)
