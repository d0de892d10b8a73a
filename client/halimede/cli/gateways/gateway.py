"""`halimede gateway`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from halimede.cli import options
from halimede.config.resolve import in_process as run_in_process
from halimede.config.resolve import resolve
from halimede_ops.errors import InvalidInput


def gateway(
    host: Annotated[str, typer.Option(help="Address to listen at. 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8080,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
    in_process: Annotated[
        bool,
        typer.Option("--in-process", help="Run HALIMEDE_REPOSITORY's models here, without Triton."),
    ] = False,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="Write each request to stdout.")
    ] = True,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Answer programs of OpenAI, Cohere, Jina, TEI, Ollama and KServe, and serve the playground."""
    from halimede.gateway import server

    if (tls_cert is None) != (tls_key is None):
        raise InvalidInput("--tls-cert and --tls-key belong together; one of them is missing.")
    resolved = resolve(config, url=url, model=model, timeout_s=timeout_s)
    if workers > 1:  # they read these anew
        given = {"CONFIG": config, "URL": url, "MODEL": model, "TIMEOUT_S": timeout_s}
        for name, value in given.items():
            if value is not None:
                os.environ[f"HALIMEDE_{name}"] = str(value)
        if in_process:
            os.environ[server.IN_PROCESS] = "1"
    if in_process:
        resolved = run_in_process(resolved)
    scheme = "http" if tls_cert is None else "https"
    print(f"halimede gateway at {scheme}://{host}:{port}", flush=True)
    server.run(
        resolved,
        host=host,
        port=port,
        workers=workers,
        with_access_log=access_log,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
