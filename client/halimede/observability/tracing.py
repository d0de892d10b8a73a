"""OpenTelemetry: a span for each call, and its context in each request to Triton.

Nothing happens in a program that does not use OpenTelemetry. A span never contains a text.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
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


def headers() -> dict[str, str]:
    """Return the W3C headers `traceparent` and `tracestate` of the current span, which make the
    server's spans part of its trace; empty without a span.
    """
    carrier: dict[str, str] = {}
    if _api() is not None:
        propagation = importlib.import_module(f"{API}.propagation.tracecontext")
        propagation.TraceContextTextMapPropagator().inject(carrier)
    return carrier


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
