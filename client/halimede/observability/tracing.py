"""OpenTelemetry: a span for each call, and its context in each request to Triton.

Nothing happens in a program that does not use OpenTelemetry. A span never contains a text.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from halimede.inputs.content import InputKind

API = "opentelemetry.trace"


def span(
    name: str, kind: InputKind, items: int
) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """Open a span; the caller puts its attributes into the mapping that is yielded."""
    trace = _api()
    if trace is None:
        return contextlib.nullcontext({})
    return _span(trace, name, {f"halimede.{kind}s": items})


@contextlib.contextmanager
def _span(trace: Any, name: str, attributes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # Only the class of an error: its message may contain what the caller gave.
    with trace.get_tracer("halimede").start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield attributes
        except Exception as error:
            attributes["error.type"] = type(error).__name__
            current.set_status(trace.StatusCode.ERROR)
            raise
        finally:
            current.set_attributes(attributes)


def server_span(
    name: str, headers: Mapping[str, str]
) -> contextlib.AbstractContextManager[dict[str, Any] | None]:
    """Open the span of a request to a server, in the trace of its headers `traceparent` and
    `tracestate`. The caller puts its attributes into the mapping that is yielded: `name` becomes
    the span's name, and an `error.type` makes it failed. None: OpenTelemetry is not used.
    """
    trace = _api()
    if trace is None or not (headers or _has_provider(trace)):
        return contextlib.nullcontext()
    return _server_span(trace, name, headers)


@contextlib.contextmanager
def _server_span(trace: Any, name: str, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    parent = _propagator().extract(headers)
    with trace.get_tracer("halimede").start_as_current_span(
        name,
        parent,
        trace.SpanKind.SERVER,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        context = current.get_span_context()
        attributes = {"trace_id": f"{context.trace_id:032x}" if context.is_valid else None}
        try:
            yield attributes
        finally:
            attributes.pop("trace_id", None)
            current.update_name(attributes.pop("name", name))
            current.set_attributes(attributes)
            if "error.type" in attributes:
                current.set_status(trace.StatusCode.ERROR)


def headers() -> dict[str, str]:
    """Return the W3C headers `traceparent` and `tracestate` of the current span, which make the
    server's spans part of its trace; empty without a span.
    """
    carrier: dict[str, str] = {}
    if _api() is not None:
        _propagator().inject(carrier)
    return carrier


def _has_provider(trace: Any) -> bool:
    """Whether the program has set a provider of tracers; without one no span is recorded."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def _propagator() -> Any:
    propagation = importlib.import_module(f"{API}.propagation.tracecontext")
    return propagation.TraceContextTextMapPropagator()


def _api() -> Any:
    """OpenTelemetry's API, if the process has imported it. Otherwise there is no parent span and
    nothing that exports one.
    """
    if sys.modules.get(API) is None:
        return None
    try:
        return importlib.import_module(API)  # waits for a thread that is importing it
    except ImportError:
        return None
