"""Health and metrics of the gateway itself."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from halimede.gateway.calls import Asked, answer
from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import Dialect, register
from halimede.gateway.edge import metrics
from halimede.gateway.errors import OVERLOAD_WAIT_S, Problem
from halimede.gateway.models.served import Served
from halimede_ops.errors import HalimedeError

READY_S = 0.4
"""Seconds in which the default model must describe itself: some probes wait 0.5 s."""

routes = APIRouter()


@routes.get("/health/live", summary="Is the gateway alive?")
async def live() -> Response:
    """Return 200."""
    return Response(status_code=200)


@routes.get("/health/ready", summary="Does the default model answer?")
async def ready(call: Asked) -> Response:
    """Return 200 if the default model describes itself, which is read every 10 s at most."""
    await check_ready(call.served)
    return answer(call, {"ready": True})


@routes.get("/metrics", summary="Metrics for Prometheus")
async def read_metrics(request: Request) -> Response:
    """Return the metrics of all workers."""
    text = await asyncio.to_thread(request.app.state.metrics.text)
    return Response(text, media_type=metrics.CONTENT_TYPE)


_probes: dict[Served, asyncio.Task[object]] = {}
"""The default model's description that is being read for each gateway of this process."""


async def check_ready(served: Served, within_s: float = READY_S) -> None:
    """Raise unless the default model describes itself now, within this time.

    Raises:
        Problem: it does not.
    """
    probe = _probes.get(served)
    if probe is None:
        probe = _probes[served] = asyncio.create_task(_describe(served))
        probe.add_done_callback(lambda ended: _forget(served, ended))
    try:
        await asyncio.wait_for(asyncio.shield(probe), within_s)
    except (TimeoutError, HalimedeError):
        raise Problem(
            503, "the default model does not answer.", retry_after_s=OVERLOAD_WAIT_S
        ) from None


def _forget(served: Served, ended: asyncio.Task[object]) -> None:
    del _probes[served]
    if not ended.cancelled():
        ended.exception()  # or asyncio logs that nobody asked for it


async def _describe(served: Served) -> object:
    return await (await served.model(None)).facts()


DIALECT = register(Dialect("health", routes, openai.error))
