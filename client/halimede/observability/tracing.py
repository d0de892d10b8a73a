"""An OpenTelemetry span around each call, and its context on each request to Triton, where the
program uses OpenTelemetry. Never a text.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from halimede.inputs.content import InputKind

API = "opentelemetry.trace"


@contextlib.contextmanager
def span(name: str, kind: InputKind, items: int) -> Iterator[dict[str, Any]]:
    """A span of this name; what is put into the mapping becomes its attributes."""
    facts: dict[str, Any] = {f"halimede.{kind}s": items}
    trace = _api()
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
    if _api() is not None:
        propagation = importlib.import_module(f"{API}.propagation.tracecontext")
        propagation.TraceContextTextMapPropagator().inject(carried)
    return carried


def _api() -> Any:
    """OpenTelemetry's API, where anything of this process has imported it: before that there is
    no span to be part of, and nobody to tell of one.
    """
    if sys.modules.get(API) is None:
        return None
    try:
        return importlib.import_module(API)  # waits for a thread that is importing it
    except ImportError:
        return None
