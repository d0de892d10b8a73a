"""The application: the dialects behind one edge."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from halimede.config.schema import Config
from halimede.gateway import dialects
from halimede.gateway.calls import Gateway
from halimede.gateway.dialects.dialect import BODIES, Dialect, dialect_at, invalid
from halimede.gateway.edge.direct import Direct
from halimede.gateway.edge.edge import Edge
from halimede.gateway.edge.keys import Keys
from halimede.gateway.edge.metrics import Metrics
from halimede.gateway.errors import Problem, problem_of
from halimede.gateway.models.served import Served
from halimede_ops.errors import HalimedeError

ERRORS: tuple[type[Exception], ...] = (
    HalimedeError,
    Problem,
    RequestValidationError,
    HTTPException,
)
"""What an endpoint raises for a request that it does not answer."""
EXPOSED = (
    "x-request-id",
    "retry-after",
    *(f"halimede-{fact}" for fact in
      ("model", "space", "precision", "provider", "truncated", "cached")),
    *(f"x-ratelimit-{fact}-{what}" for what in ("requests", "tokens")
      for fact in ("limit", "remaining", "reset")),
)  # fmt: skip
"""Headers that the pages of other origins may read."""


def create(config: Config) -> FastAPI:
    """Return the application of a configuration. It connects when it is first asked."""
    served = Served(config)
    keys = Keys.read(config.gateway)
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await served.close()
        await keys.close()

    app = FastAPI(
        title="halimede gateway",
        version=importlib.metadata.version("halimede"),
        description="Embeddings, scores and labels in the dialects of other servers and APIs.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.state.gateway = Gateway(config.gateway, served)
    app.state.keys = keys
    app.state.metrics = metrics
    for dialect in dialects.ALL:
        app.include_router(dialect.router)
    for kind in ERRORS:
        app.add_exception_handler(kind, _refuse)
    routes = [route for dialect in dialects.ALL for route in dialect.router.routes]
    app.add_middleware(Direct, routes=routes, errors=ERRORS, refuse=_refuse)
    app.add_middleware(Edge, config=config.gateway, refuse=refusal, keys=keys, metrics=metrics)
    if config.gateway.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.gateway.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI of the application, with the bodies that pydantic reads itself."""
    if app.openapi_schema is None:
        kinds: Any = [(kind, "validation") for kind in sorted(BODIES, key=lambda k: k.__name__)]
        names, bodies = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        for kind, places in BODIES.items():
            for schema in places:
                schema.update(names[kind, "validation"])
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        made.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = made
    return app.openapi_schema


async def _refuse(request: Request, error: Exception) -> Response:
    call = getattr(request.state, "call", None)
    known = dict(call.headers()) if call is not None else {}
    return refusal(dialect_at(request.url.path), _problem(error), known)


def _problem(error: Any) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, HalimedeError):
        return problem_of(error)
    if isinstance(error, RequestValidationError):
        return invalid(error)
    if error.status_code == 404:
        return Problem(404, "There is nothing at this path. /openapi.json lists what there is.")
    return Problem(error.status_code, str(error.detail), headers=error.headers or {})


def refusal(dialect: Dialect, problem: Problem, known: dict[str, str]) -> Response:
    """Return a problem in the shape of a dialect."""
    import orjson

    headers = {**known, **problem.headers}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(problem.retry_after_s)))
    elif problem.status >= 500 or problem.status in (408, 409):
        headers.setdefault("x-should-retry", "false")
    status, body = dialect.error(problem)
    return Response(orjson.dumps(body), status, headers, "application/json")
