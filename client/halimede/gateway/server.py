"""The server: uvicorn with the application, in one process or several workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halimede.config.resolve import resolve
from halimede.config.schema import Config
from halimede.extras import needs_extra

if TYPE_CHECKING:
    from fastapi import FastAPI

IN_PROCESS = "HALIMEDE_GATEWAY_IN_PROCESS"
"""Variable by which workers know that they run the models themselves."""
BACKLOG = 2048
"""Connections that wait to be accepted."""
KEEP_ALIVE_S = 75
"""Seconds that a connection without a request stays open: longer than the 60 of most balancers."""


def run(
    config: Config,
    *,
    host: str,
    port: int,
    workers: int = 1,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let requests under way end.

    Several workers resolve the configuration anew, from the environment.

    Raises:
        MissingExtra: the packages of the extra `gateway` are not installed.
    """
    with needs_extra("gateway"):
        import uvicorn

        from halimede.gateway.app import create
        from halimede.gateway.protocol import Protocol

        app: Any = create(config) if workers == 1 else "halimede.gateway.server:application"
    uvicorn.run(
        app,
        factory=workers > 1,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http=Protocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(config.gateway.drain_s),
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )


def application() -> FastAPI:
    """Return the application of a worker, whose configuration is in the environment."""
    from halimede.gateway.app import create

    config = resolve()
    return create(in_process(config) if os.environ.get(IN_PROCESS) else config)


def in_process(config: Config) -> Config:
    """Return the configuration with its default model run in this process, without Triton."""
    from halimede import providers
    from halimede.config.validation import validated

    name = config.default_model
    given = {"provider": "onnx", "model_id": config.models[name].model_id}
    options = validated(providers.options_of("onnx"), given, f"models.{name}")
    return config.model_copy(update={"models": {**config.models, name: options}})
