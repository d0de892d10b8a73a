"""`halimede serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halimede.extras import needs_extra
from halimede_tools.cli.options import names
from halimede_tools.settings import Settings

Host = Annotated[str, typer.Option(help="Address to listen on, IPv4 or IPv6, or a name of it.")]
HttpPort = Annotated[int, typer.Option(help="1 to 65535.")]
GrpcPort = Annotated[int, typer.Option(help="1 to 65535.")]
MetricsPort = Annotated[int, typer.Option(help="1 to 65535.")]
LogLevel = Annotated[str, typer.Option(help="error, warning, info or verbose.")]
Models = Annotated[
    str, typer.Option(help="Names, separated by commas; empty: all models of the repository.")
]
Runtime = Annotated[str, typer.Option(help="wheel: Triton from PyPI; docker: NVIDIA's container.")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM certificate: gRPC with TLS.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM key of the certificate.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(help="PEM certificates that sign clients; other clients are refused."),
]
ControlKeyFile = Annotated[Path | None, typer.Option(help="File with the key of model control.")]
TraceUrl = Annotated[str, typer.Option(help="OpenTelemetry collector: http://HOST:4318/v1/traces.")]
TraceEvery = Annotated[int, typer.Option(help="Trace one request in N.")]
Exec = Annotated[
    bool,
    typer.Option(
        "--exec",
        help="Replace this process with Triton, for containers: build nothing, log to stdout.",
    ),
]
Steps = Annotated[bool, typer.Option("--steps", help="On the wheel: serve each ensemble's steps.")]
ResponseCacheMb = Annotated[
    int, typer.Option(min=0, help="Response cache of each model, in MB; 0: no cache.")
]


def serve(
    host: Host = "127.0.0.1",
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    log_level: LogLevel = "warning",
    models: Models = "",
    runtime: Runtime = "wheel",
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    control_key_file: ControlKeyFile = None,
    trace_url: TraceUrl = "",
    trace_every: TraceEvery = 100,
    replace: Exec = False,
    steps: Steps = False,
    response_cache_mb: ResponseCacheMb = 0,
) -> None:
    """Serve the repository with Triton; build missing models first."""
    with needs_extra("server"):
        from halimede_tools.serve import supervise
        from halimede_tools.serve.options import Options

    options = Options(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log_level=log_level,
        models=names(models),
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        control_key_file=control_key_file,
        steps=steps,
        response_cache_mb=response_cache_mb,
        trace_url=trace_url,
        trace_every=trace_every,
    )
    if replace:
        supervise.exec_server(Settings(), options)
    else:
        supervise.serve(Settings(), options, runtime)
