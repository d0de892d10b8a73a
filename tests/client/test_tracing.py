"""One trace from the caller's span through the client to Triton, as a collector hears it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from conftest import MODEL, free_options
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from halimede import Embedder
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TIMEOUT_S = 90.0
SECRET_TEXT = "the text that no trace may hold"


class Span(NamedTuple):
    """What is asked of a span here; ids in hex."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str


class Collector(ThreadingHTTPServer):
    """An OpenTelemetry collector over HTTP that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Told)
        self.bodies: list[bytes] = []
        self.spans: list[Span] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def trace(self, trace_id: int) -> dict[str, list[Span]]:
        """The spans of one trace, by name."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            if span.trace_id == trace_id.to_bytes(16, "big").hex():
                found.setdefault(span.name, []).append(span)
        return found


class Told(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_json = self.headers["Content-Type"].startswith("application/json")
        self.server.bodies.append(body)
        self.server.spans += _of_json(body) if is_json else _of_protobuf(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def _of_json(body: bytes) -> Iterator[Span]:
    """As Triton tells."""
    for resource in json.loads(body)["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                ids = (span.get(name, "") for name in ("traceId", "spanId", "parentSpanId"))
                yield Span(span["name"], *ids)


def _of_protobuf(body: bytes) -> Iterator[Span]:
    """As the client's SDK tells."""
    told = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
    for resource in told.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                ids = (span.trace_id, span.span_id, span.parent_span_id)
                yield Span(span.name, *[one.hex() for one in ids])


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.shutdown()


@pytest.fixture(scope="module")
def traced(
    settings: Settings, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[wheel.Server]:
    """A server that tells the collector of what it does."""
    options = free_options(models=(MODEL,), trace_url=collector.url, trace_every=1)
    run = tmp_path_factory.mktemp("traced")
    with wheel.serve(settings.repository, settings.python_backend, run, options) as server:
        yield server


@pytest.fixture(scope="module")
def told(tracers: TracerProvider, collector: Collector) -> Iterator[None]:
    """The collector hears of every span of this process, until these tests are over: an exporter
    whose collector has gone would hold each later call.
    """
    processor = SimpleSpanProcessor(OTLPSpanExporter(collector.url))
    tracers.add_span_processor(processor)
    yield
    processor.shutdown()


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_client_and_triton_are_one_trace(
    traced: wheel.Server, collector: Collector, scheme: str
) -> None:
    """The caller's span is above the client's, and that above Triton's; no text is in any."""
    address = traced.grpc_address if scheme == "grpc" else traced.http_address
    deadline = time.monotonic() + TIMEOUT_S
    found: dict[str, list[Span]] = {}
    with Embedder(f"{scheme}://{address}", MODEL) as embedder:
        with trace.get_tracer("a caller").start_as_current_span("caller") as mine:
            context = mine.get_span_context()
            # Triton drops what it could not tell: another call, another chance.
            while "InferRequest" not in found and time.monotonic() < deadline:
                embedder.embed([SECRET_TEXT])
                time.sleep(1)
                found = collector.trace(context.trace_id)
    caller = context.span_id.to_bytes(8, "big").hex()
    assert {span.parent_id for span in found["halimede.embed"]} == {caller}
    calls = {span.span_id for span in found["halimede.embed"]}
    assert {span.parent_id for span in found["InferRequest"]} <= calls
    assert not any(SECRET_TEXT.encode() in body for body in collector.bodies)
