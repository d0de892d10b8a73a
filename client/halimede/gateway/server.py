"""The server: uvicorn with the application, in one process or several workers."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halimede.config.resolve import in_process, resolve
from halimede.config.schema import Config
from halimede.extras import needs_extra

if TYPE_CHECKING:
    from fastapi import FastAPI

IN_PROCESS = "HALIMEDE_GATEWAY_IN_PROCESS"
"""Variable by which workers know that they run the models themselves."""
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of prometheus_client's for the folder through which workers share their metrics."""
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
    with_access_log: bool = True,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let requests under way end.

    Several workers resolve the configuration anew, from the environment.

    Raises:
        MissingExtra: the packages of the extra `gateway` are not installed.
        InvalidConfig: the file of API keys is invalid.
    """
    with needs_extra("gateway"):
        import uvicorn

        from halimede.gateway.edge import access_log
        from halimede.gateway.edge.keys import Keys
        from halimede.gateway.edge.protocol import Protocol
    if not with_access_log:
        os.environ[access_log.OFF] = "1"
    Keys.read(config.gateway)  # a worker's error would be a traceback
    with _shared_metrics() if workers > 1 else contextlib.nullcontext():
        uvicorn.run(
            application_of(config) if workers == 1 else "halimede.gateway.server:application",
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


@contextlib.contextmanager
def _shared_metrics() -> Iterator[None]:
    """Let the workers share their metrics through a fresh folder."""
    if METRICS_FOLDER in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="halimede-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[METRICS_FOLDER]


def application_of(config: Config) -> FastAPI:
    """Return the application of a configuration, with its access log."""
    from halimede.gateway.app import create
    from halimede.gateway.edge import access_log

    access_log.start()
    return create(config)


def application() -> FastAPI:
    """Return the application of a worker, whose configuration is in the environment."""
    config = resolve()
    return application_of(in_process(config) if os.environ.get(IN_PROCESS) else config)
