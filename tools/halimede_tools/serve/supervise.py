"""Serve: prepare what is missing, start Triton, show that it embeds, wait for the stop signal."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

from halimede import Embedder
from halimede.models import catalogue
from halimede_launch import watch
from halimede_ops.errors import ServeError
from halimede_repository import configs
from halimede_tools.build.plan import PRECISIONS, build, order
from halimede_tools.build.repository import served_name
from halimede_tools.build.steps import console
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

SAMPLE = "hello world"
SHORT_S = 60.0
SHORT_LIVES = 3
"""A server that ends sooner than this after its start, so many times in a row, will again."""


def serve(settings: Settings, options: wheel.Options, runtime: str) -> None:
    """Serve until SIGINT or SIGTERM; a server that ends by itself is started again.

    Raises:
        BuildError: a model that is missing could not be built.
        ServeError: the server could not be started, or ended soon after.
    """
    with _interrupted_by_sigterm():
        for model in _missing(settings, options):
            build(order(model), settings)
        try:
            short = 0
            while short < SHORT_LIVES:
                began = time.monotonic()
                with _runtime(runtime, settings, options) as server:
                    show(options)
                    ended = _ended(server)
                short = short + 1 if time.monotonic() - began < SHORT_S else 0
                console.print(f"{ended}; it is started again")
            raise ServeError(f"{ended}; {short} times soon after its start")
        except KeyboardInterrupt:
            console.print("stopped")


def _ended(server: wheel.Running) -> str:
    """How the server has ended, once it has; one that lost a process of its own is killed."""
    while server.is_running():
        if server.has_lost_a_process():
            server.kill()
            return watch.CHILD_DIED
        time.sleep(watch.POLL_INTERVAL_S)
    return server.how_it_ended()


def _runtime(
    runtime: str, settings: Settings, options: wheel.Options
) -> contextlib.AbstractContextManager[wheel.Running]:
    if runtime == "wheel":
        run = settings.run(options.grpc_port)
        return wheel.serve(settings.repository, settings.python_backend, run, options)
    if runtime == "docker":
        if options.response_cache_mb:
            raise ServeError("the container serves the steps, which have no response cache.")
        from halimede_tools.serve import container

        return container.serve(settings.repository, settings.python_backend, options)
    raise ServeError(f"runtime {runtime!r} is unknown; use wheel or docker")


def _missing(settings: Settings, options: wheel.Options) -> list[str]:
    """Models of the catalogue that are asked for and not built; none named asks for the default."""
    asked = options.models or tuple(_all_precisions(catalogue.DEFAULT))
    return sorted(
        {
            model.name
            for model in catalogue.MODELS
            for name in _all_precisions(model.name)
            if name in asked and not configs.is_built(settings.repository / name)
        }
    )


def _all_precisions(model: str) -> list[str]:
    return [served_name(model, precision) for precision in PRECISIONS]


def show(options: wheel.Options) -> None:
    """Embed a sample and print what a user needs to go on."""
    model = (options.models or (catalogue.DEFAULT,))[0]
    http = f"http://{options.http_host}:{options.http_port}"
    grpc = f"{options.host}:{options.grpc_port}"
    with Embedder(grpc if options.tls_cert is None else http, model) as embedder:
        result = embedder.embed([SAMPLE])
    head = ", ".join(f"{value:.4f}" for value in result.vectors[0, :6])
    console.print(f"\n[bold green]ready[/]  {model}, {result.precision}, space {result.space}")
    console.print(f'  "{SAMPLE}" → [{head}, …] ({result.dims} numbers)')
    console.print(f"  gRPC     {grpc if options.tls_cert is None else f'grpcs://{grpc}'}")
    console.print(f"  HTTP     {http}")
    console.print(f"  metrics  http://{options.host}:{options.metrics_port}/metrics")
    console.print(f"\n  {curl(http, model)}\n")
    console.print("  Ctrl-C stops it.")


def curl(http: str, model: str) -> str:
    """A curl command that embeds the sample over HTTP."""
    tensor = f'{{"name":"TEXT","datatype":"BYTES","shape":[1,1],"data":["{SAMPLE}"]}}'
    return f"curl -s {http}/v2/models/{model}/infer -d '{{\"inputs\":[{tensor}]}}'"


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: unwind, and stop what was started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
