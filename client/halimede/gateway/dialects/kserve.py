"""KServe v2 over HTTP: Triton's own API, proxied unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import httpx
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from halimede.gateway.calls import Asked, Call
from halimede.gateway.dialects.dialect import Dialect, register
from halimede.gateway.errors import OVERLOAD_WAIT_S, Problem
from halimede.providers.triton import connection, provider

METHODS = ["GET", "POST", "HEAD", "PUT", "PATCH", "DELETE"]
HTTP_PORT = 8000
"""Triton's usual port for HTTP."""
OPEN = re.compile(
    r"(health/(live|ready)|models/stats|repository/index"
    r"|models/(?P<model>\w[^/]{0,255})(/versions/\d+)?"
    r"(/(infer|generate|generate_stream|config|stats|ready))?)?"
)
"""Paths below `/v2` that only read and infer. Those that load models, register shared memory, or
change logs and traces are not proxied."""
NOT_PROXIED = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
     "transfer-encoding", "upgrade", "host", "authorization", "x-api-key", "api-key",
     "cookie", "expect")
)  # fmt: skip
"""Headers of one connection, and the credentials of this gateway."""
FROM_US = frozenset(("date", "server"))
"""Headers of an answer that uvicorn adds itself."""


class Upstream(NamedTuple):
    """The Triton behind the gateway."""

    url: str
    client: httpx.AsyncClient


@contextlib.asynccontextmanager
async def _closing(app: FastAPI) -> AsyncIterator[None]:
    yield
    if upstream := getattr(app.state, "kserve", None):
        await upstream.client.aclose()


routes = APIRouter(include_in_schema=False, lifespan=_closing)


async def triton(request: Request, call: Asked) -> Upstream:
    """Return the Triton behind the gateway.

    Raises:
        Problem: there is none.
    """
    state = request.app.state
    if getattr(state, "kserve", None) is None:
        opened = await _open(call)
        if getattr(state, "kserve", None) is None:  # nobody was faster
            state.kserve = opened
        else:
            await opened.client.aclose()
    return state.kserve


@routes.api_route("/v2", methods=METHODS)
@routes.api_route("/v2/{path:path}", methods=METHODS)
async def proxy(
    request: Request, call: Asked, upstream: Annotated[Upstream, Depends(triton)], path: str = ""
) -> Response:
    """Pass a request on to Triton, and its answer back, as they come."""
    await _admit(call, path)
    sent = httpx.Request(
        request.method,
        f"{upstream.url}/v2{quote('/' + path if path else '')}{_query(request)}",
        headers=[
            (name.encode("latin-1"), value.encode("latin-1"))  # httpx would take ASCII alone
            for name, value in _passed(request.headers).items()
        ],
        content=request.stream() if _has_body(request) else None,
        extensions={"timeout": upstream.client.timeout.as_dict()},
    )
    try:
        answer = await upstream.client.send(sent, stream=True)
    except httpx.TimeoutException:
        raise Problem(504, "Triton did not answer in time.") from None
    except httpx.HTTPError:
        raise Problem(503, "Triton does not answer.", retry_after_s=OVERLOAD_WAIT_S) from None
    return StreamingResponse(_parts(answer), answer.status_code, _passed(answer.headers, FROM_US))


async def _parts(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


async def _admit(call: Call, path: str) -> None:
    """Raise unless the caller may ask Triton for this.

    Tokens of proxied requests are not counted, because only Triton reads them.

    Raises:
        Problem: the path controls Triton, or the model is not the caller's.
    """
    found = OPEN.fullmatch(path)
    if found is None:
        raise Problem(
            403,
            "This path of Triton's is not proxied. /v2, /v2/health, /v2/models and "
            "/v2/repository/index are; load models and change settings at the server itself.",
        )
    name = found["model"]
    if name is None:
        return
    if not call.config.serve_all:
        models = [await call.served.model(known) for known in call.served.names()]
        if name not in {model.options.model_id for model in models}:
            raise Problem(404, "there is no model of this name.", "model_not_found")
    call.caller.check_model(name)
    await call.caller.check_tokens()
    pinned = call.caller.space
    if pinned and (await (await call.served.model(name)).facts()).space != pinned:
        raise Problem(
            409,
            "the model is of another space than halimede-space.",
            headers={"x-should-retry": "false"},
        )


async def _open(call: Call) -> Upstream:
    options = (await call.served.model(None)).options
    server = options if isinstance(options, provider.Options) else None
    tls = server.tls if server else connection.Tls()
    if call.config.kserve_url:
        url = call.config.kserve_url.rstrip("/")
    elif server:
        address = connection.parse(server.url[0])
        url = address.url
        if address.is_grpc:
            url = f"{url.rpartition(':')[0]}:{HTTP_PORT}"
    else:
        raise Problem(
            501,
            "The default model is not on a Triton, so there is nothing to proxy /v2 to. "
            "gateway.kserve_url sets the address of one.",
        )
    client = await asyncio.to_thread(
        httpx.AsyncClient,
        verify=tls.for_http(),
        timeout=options.timeout_s,
        trust_env=not connection.parse(url).is_loopback,
        limits=httpx.Limits(max_connections=call.config.max_requests),
    )
    return Upstream(url, client)


def _query(request: Request) -> str:
    return f"?{request.url.query}" if request.url.query else ""


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def _passed(headers: Mapping[str, str], others: frozenset[str] = frozenset()) -> dict[str, str]:
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    dropped = NOT_PROXIED | others | named
    return {name: value for name, value in headers.items() if name.lower() not in dropped}


def error(problem: Problem) -> tuple[int, Any]:
    """Return a problem as Triton does."""
    return problem.status, {"error": problem.message}


DIALECT = register(Dialect("kserve", routes, error))
