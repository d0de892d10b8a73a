"""Serve: prepare what is missing, start Triton, show that it embeds, wait for the stop signal."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from typing import NoReturn

from halimede import Embedder
from halimede.models import catalogue
from halimede_launch import watch
from halimede_ops.errors import ServeError
from halimede_repository import configs
from halimede_tools.build.plan import PRECISIONS, build, build_request
from halimede_tools.build.repository import served_name
from halimede_tools.console import console
from halimede_tools.serve import joining, wheel
from halimede_tools.serve.options import Options
from halimede_tools.settings import Settings

SAMPLE = "hello world"
SHORT_S = 60.0
SHORT_LIVES = 3
"""A server that ends sooner than this after its start, so many times in a row, will again."""


def serve(settings: Settings, options: Options, runtime: str) -> None:
    """Serve until SIGINT or SIGTERM; a server that ends by itself is started again.

    Of a model that is not built yet the first precision is built and served; the others are built
    beside the server, and each joins it when it is checked.

    Raises:
        BuildError: a model that is missing could not be built.
        ServeError: the server could not be started, or ended soon after.
    """
    with _interrupted_by_sigterm():
        try:
            builds = _build_first(settings, options)
            log = settings.run(options.grpc_port) / "build.log"
            with joining.building(builds, options, log) as joined:
                _keep_running(settings, options, runtime, builds, joined)
        except KeyboardInterrupt:
            console.print("stopped")


def _keep_running(
    settings: Settings,
    options: Options,
    runtime: str,
    builds: Sequence[joining.Build],
    joined: Collection[str],
) -> NoReturn:
    short = 0
    while short < SHORT_LIVES:
        began = time.monotonic()
        pending = {name for build in builds for name in build.ensembles} - {*joined}
        built = _without(pending, settings, options)
        with _runtime(runtime, settings, built) as server:
            show(built)
            if pending:
                console.print(f"  Being built, joins when checked: {', '.join(sorted(pending))}")
            ended = _ended(server)
        short = short + 1 if time.monotonic() - began < SHORT_S else 0
        console.print(f"{ended}; it is started again")
    raise ServeError(f"{ended}; {short} times soon after its start")


def become(settings: Settings, options: Options) -> NoReturn:
    """Replace this process by Triton, as a container wants it; build nothing.

    Raises:
        ServeError: as `wheel.become`.
    """
    backends = settings.backends or wheel.lay_out(
        settings.python_backend, settings.run(options.grpc_port) / "backends"
    )
    wheel.become(settings.repository, backends, options)


def _ended(server: wheel.Running) -> str:
    """How the server has ended, once it has; one that lost a process of its own is killed."""
    while server.is_running():
        if server.has_lost_a_process():
            server.kill()
            return watch.TOLD
        time.sleep(watch.EVERY_S)
    return server.how_it_ended()


def _runtime(
    runtime: str, settings: Settings, options: Options
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


def _build_first(settings: Settings, options: Options) -> list[joining.Build]:
    """Build the first precision of each model of the catalogue that is asked for and has none yet;
    the builds of its others. Without names the default model is asked for.
    """
    later = []
    for model, precisions in _asked(options).items():
        missing = [
            precision
            for precision in precisions
            if not configs.is_built(settings.repository / served_name(model, precision))
        ]
        if missing == precisions:
            build(build_request(model, precisions=(missing.pop(0),)), settings)
        if missing:
            later.append(joining.Build(model, tuple(missing)))
    return later


def _asked(options: Options) -> dict[str, list[str]]:
    """Model of the catalogue → its precisions that are asked for."""
    if not options.models:
        return {catalogue.DEFAULT: list(PRECISIONS)}
    asked = {
        model.name: [one for one in PRECISIONS if served_name(model.name, one) in options.models]
        for model in catalogue.models()
    }
    return {model: precisions for model, precisions in asked.items() if precisions}


def _without(pending: Collection[str], settings: Settings, options: Options) -> Options:
    """The options that serve what is asked for and not pending."""
    if not pending:
        return options
    asked = options.models or configs.to_load(settings.repository)
    return options.model_copy(update={"models": tuple(n for n in asked if n not in pending)})


def show(options: Options) -> None:
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
