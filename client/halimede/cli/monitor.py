"""`halimede monitor`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from halimede.cli import options
from halimede.cli.models import served_models
from halimede.cli.printing import printable
from halimede.embedder import Embedder
from halimede.observability.monitor import (
    Monitor,
    check_intervals,
    check_port,
    serve_metrics,
    watch,
)


def monitor(
    every_s: Annotated[
        float, typer.Option(help="Seconds between two probes of a model; above 0.")
    ] = 15.0,
    host: Annotated[
        str, typer.Option(help="Address on which the metrics are served.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port on which the metrics are served; 0: any free port.")
    ] = 8003,
    metrics_url: Annotated[
        str | None, typer.Option(help="Triton's metrics, such as http://127.0.0.1:8002/metrics.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Number of probes. Default: until interrupted.")
    ] = None,
    url: options.Url = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Probe every served model regularly, print each change, and serve metrics to Prometheus.

    A model is unhealthy if its probe fails or takes more than 5 s, or if the server uses more than
    90 % of its memory. For a server on this machine that is its own memory, of the limit of its
    cgroup or of the machine; for others it is the memory of their machine, from --metrics-url. Exit
    code 1 if a model is unhealthy after the last probe.
    """
    check_intervals(every_s, rounds)
    check_port(port)
    with contextlib.ExitStack() as stack:
        embedders = {
            model.name: stack.enter_context(Embedder(url, model.name, timeout_s=timeout_s))
            for model in served_models(url, timeout_s)
        }
        watched = Monitor(embedders, metrics_url)
        server = serve_metrics(watched, host, port)
        stack.callback(server.shutdown)
        shown = f"[{host}]" if ":" in host else host
        print(f"metrics  http://{shown}:{server.server_port}/metrics", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            watch(watched, every_s, lambda line: print(printable(line), flush=True), rounds)
    if not all(report["healthy"] for report in watched.reports.values()):
        raise typer.Exit(1)
