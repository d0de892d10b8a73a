"""The edge: what holds for every request before and after its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from halimede.config.gateway import GatewayConfig
from halimede.gateway.dialects.dialect import Dialect, dialect_at
from halimede.gateway.edge import access_log
from halimede.gateway.edge.keys import Caller, Keys
from halimede.gateway.edge.metrics import Labels, Metrics
from halimede.gateway.errors import OVERLOAD_WAIT_S, Problem
from halimede.observability import tracing

OPEN = frozenset(
    ("/", "/openapi.json", "/metrics", "/health", "/health/live", "/health/ready",
     "/.well-known/live", "/.well-known/ready", "/v2/health/live", "/v2/health/ready")
)  # fmt: skip
"""Paths that are read without a key, and while the gateway is overloaded."""
PAGE, PAGE_API = "/playground/", "/playground/api/"
"""The playground's files are open, too; what they ask is not."""
REQUEST_ID = re.compile(rb"[\x21-\x7e][\x20-\x7e]{0,126}[\x21-\x7e]|[\x21-\x7e]")
"""A request id that is taken over: up to 128 characters of ASCII that can be printed."""
SPACE = re.compile(rb"[0-9a-fA-F]{16}")
TRACE_ID = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-")
LINGER_S = 2.0
"""Longest wait for the rest of a body that is too large. A client that is cut off while it sends
may not see the answer."""
LOGGED_FRAMES = 6
"""Innermost frames of an error of ours that are logged."""
GONE = 499
"""Status of a request whose client left before the answer."""
MIB = 1024 * 1024
Refuse = Callable[[Dialect, Problem, dict[str, str]], Response]
log = logging.getLogger("halimede.gateway.edge.edge")


class Exchange:
    """A request and its answer."""

    def __init__(self, scope: Any, receive: Any, send: Any, config: GatewayConfig) -> None:
        self.scope = scope
        self.given: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = self._request_id()
        self.start_s = time.perf_counter()
        self.is_open = _is_open(scope["method"], scope["path"])
        """Whether it needs no key, and is answered under overload, too."""
        self.status = 0
        """Status of the answer; 0 until it starts."""
        self.problem: Problem | None = None
        """Why the body was not read to its end."""
        self._receive = receive
        self._send = send
        self._config = config
        self._body_bytes = 0
        self._is_read = False
        self._body_ends_s = asyncio.get_running_loop().time() + config.body_timeout_s

    @property
    def caller(self) -> Caller:
        """Who asks."""
        return self.scope["state"]["caller"]

    @property
    def space(self) -> str | None:
        """The space that the caller pins.

        Raises:
            Problem: it is none.
        """
        given = self.given.get(b"halimede-space")
        if given is None:
            return None
        if not SPACE.fullmatch(given):
            raise Problem(
                400, "halimede-space is a space of 16 hex digits, as an answer's header has it."
            )
        return given.decode().lower()

    @property
    def trace(self) -> dict[str, str]:
        """The W3C headers of the caller's trace."""
        names = (b"traceparent", b"tracestate")
        return {n.decode(): self.given[n].decode("latin-1") for n in names if n in self.given}

    @property
    def trace_id(self) -> str | None:
        """The id of the caller's trace."""
        found = TRACE_ID.match(self.given.get(b"traceparent", b""))
        return found[1].decode() if found else None

    @property
    def route(self) -> str | None:
        """The template of the endpoint's path. None: the request was refused before it was found,
        or there is none.
        """
        return getattr(self.scope.get("route"), "path", None)

    def check_length(self) -> None:
        """Raise if the body says that it is too large.

        Raises:
            Problem: it does.
        """
        if int(self.given.get(b"content-length", 0)) > self._max_bytes:
            raise self._too_large()

    async def receive(self) -> Any:
        """Return the next part of the body.

        Raises:
            Problem: the body is too large, or takes too long.
        """
        if self._is_read:
            return await self._receive()
        try:
            async with asyncio.timeout_at(None if self.status else self._body_ends_s):
                message = await self._receive()
        except TimeoutError:
            self.problem = Problem(
                408,
                f"the body did not arrive within {self._config.body_timeout_s:g} s.",
                headers={"Connection": "close"},
            )
            raise self.problem from None
        self._body_bytes += len(message.get("body", b""))
        self._is_read = not message.get("more_body", False)
        if self._body_bytes > self._max_bytes:
            self.problem = self._too_large()
            raise self.problem
        return message

    async def send(self, message: Any) -> None:
        """Send a part of the answer, unless the body has a problem that the endpoint hid."""
        if not self.status:
            if self.problem is not None:
                return
            self._start(message)
        await self._send(message)

    async def refuse(self, problem: Problem, refuse: Refuse) -> None:
        """Answer with a problem."""
        response = refuse(dialect_at(self.scope["path"]), problem, {})
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        self._start(start)
        await self._send(start)
        body = {"type": "http.response.body", "body": response.body}
        if problem.status == 413:
            await self._send({**body, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while (await self._receive()).get("more_body"):
                        pass
            body["body"] = b""
        await self._send(body)

    def _start(self, message: Any) -> None:
        self.status = message["status"]
        allowance = self.caller.allowance
        limits = allowance.headers() if allowance is not None else {}
        message["headers"] = [
            *message.get("headers", ()),
            (b"x-request-id", self.request_id),
            *((name.encode(), value.encode()) for name, value in limits.items()),
        ]

    def _request_id(self) -> bytes:
        given = self.given.get(b"x-request-id", b"")
        return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

    @property
    def _max_bytes(self) -> float:
        return self._config.max_body_mib * MIB

    def _too_large(self) -> Problem:
        return Problem(
            413,
            f"the body is larger than {self._config.max_body_mib:g} MiB. Send several requests.",
            headers={"Connection": "close"},
        )


class Edge:
    """The outermost application."""

    def __init__(
        self, app: Any, config: GatewayConfig, refuse: Refuse, keys: Keys, metrics: Metrics
    ) -> None:
        self.app = app
        self._config = config
        self._refuse = refuse
        self._keys = keys
        self._metrics = metrics
        self._under_way = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = Caller()
        exchange = Exchange(scope, receive, send, self._config)
        if exchange.is_open:
            await self._answer_watched(exchange)
            return
        self._under_way += 1
        self._metrics.in_flight.inc()
        try:
            await self._answer_watched(exchange)
        finally:
            self._under_way -= 1
            self._metrics.in_flight.dec()

    async def _answer_watched(self, exchange: Exchange) -> None:
        """Answer a request within its span, and tell of it."""
        with tracing.server_span("HTTP request", exchange.trace) as span:
            try:
                await self._answer(exchange)
            finally:
                self._tell(exchange, span)

    async def _answer(self, exchange: Exchange) -> None:
        """Answer a request, or refuse it."""
        problem = None
        try:
            await self._admit(exchange)
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except Problem as error:
            problem = error
        except ClientDisconnect:
            return
        except Exception as error:
            # Not its message: it may contain what the caller gave.
            frames = "".join(traceback.format_tb(error.__traceback__)[-LOGGED_FRAMES:])
            name = type(error).__name__
            log.error("request %s: %s\n%s", exchange.request_id.decode(), name, frames)
            problem = Problem(500, "The gateway failed on this request.", "server_error")
        problem = exchange.problem or problem
        if problem is not None and not exchange.status:
            await exchange.refuse(problem, self._refuse)

    async def _admit(self, exchange: Exchange) -> None:
        """Raise unless the request may be answered now.

        Raises:
            Problem: it may not.
        """
        scope = exchange.scope
        if not exchange.is_open:
            if self._under_way > self._config.max_requests:
                raise Problem(
                    429, "the gateway is overloaded. Send again.", retry_after_s=OVERLOAD_WAIT_S
                )
            key = self._keys.find(scope["headers"])
            caller = await self._keys.caller(key, exchange.space)
            scope["state"]["caller"] = caller
            if caller.allowance is not None:
                caller.allowance.check_requests()
        exchange.check_length()

    def _tell(self, exchange: Exchange, span: dict[str, Any] | None) -> None:
        """Tell metrics, the trace and the access log of an answer."""
        scope, status = exchange.scope, exchange.status or GONE
        route, method = exchange.route, scope["method"]
        seconds = time.perf_counter() - exchange.start_s
        call = scope["state"].get("call")
        labels = Labels(
            dialect_at(route or scope["path"]).name,
            call.model_name if call else "",
            exchange.caller.key_id,
        )
        facts = {"inputs": 0, "tokens": 0, "truncated": 0}
        if call is not None and call.results:
            facts = {"inputs": call.inputs, "tokens": call.tokens, "truncated": call.truncated}
            self._metrics.count_inputs(labels, *facts.values())
        self._metrics.count(labels, status, seconds)
        if access_log.is_on():
            access_log.write(
                {
                    "request_id": exchange.request_id.decode(),
                    "method": method,
                    "route": route,
                    "status": status,
                    "ms": round(seconds * 1000, 3),
                    **labels._asdict(),
                    **facts,
                    "trace_id": span["trace_id"] if span else exchange.trace_id,
                }
            )
        if span is not None:
            span["name"] = f"{method} {route or ''}".strip()
            span["http.request.method"] = method
            span["http.route"] = route or ""
            span["http.response.status_code"] = status
            for name, value in (*labels._asdict().items(), *facts.items()):
                span[f"halimede.{name}"] = value
            if status >= 500:
                span["error.type"] = str(status)


def _is_open(method: str, path: str) -> bool:
    if method not in ("GET", "HEAD"):
        return False
    return path in OPEN or (path.startswith(PAGE) and not path.startswith(PAGE_API))
