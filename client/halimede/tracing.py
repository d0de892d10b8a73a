"""An OpenTelemetry span around each call, and its context on each request to Triton, where
OpenTelemetry is installed. Never a text.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from halimede.items import Kind

try:
    trace: Any = importlib.import_module("opentelemetry.trace")
    propagation: Any = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
except ImportError:
    trace = None


@contextlib.contextmanager
def span(name: str, kind: Kind, items: int) -> Iterator[dict[str, Any]]:
    """A span of this name; what is put into the mapping becomes its attributes."""
    facts: dict[str, Any] = {f"halimede.{kind}s": items}
    if trace is None:
        yield facts
        return
    # An error's message may name what the caller gave: its class is enough.
    with trace.get_tracer("halimede").start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield facts
        except Exception as error:
            facts["error.type"] = type(error).__name__
            current.set_status(trace.StatusCode.ERROR)
            raise
        finally:
            current.set_attributes(facts)


def headers() -> dict[str, str]:
    """The current span as W3C's `traceparent` and `tracestate`, so that what a server does becomes
    part of its trace; empty without a span.
    """
    carried: dict[str, str] = {}
    if trace is not None:
        propagation.TraceContextTextMapPropagator().inject(carried)
    return carried
