"""Serve: build missing models, start Triton, embed a sample, wait for the stop signal."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from halimede import Embedder
from halimede.config.folders import HOME, writing
from halimede.extras import needs_extra
from halimede.models import catalogue
from halimede_engine import cores
from halimede_launch import watch
from halimede_ops.errors import ServeError
from halimede_repository import configs
from halimede_tools.build.repository import SUFFIXES, served_name
from halimede_tools.console import console
from halimede_tools.serve import addresses, background_builds, wheel
from halimede_tools.serve.options import Options
from halimede_tools.settings import Settings

SAMPLE = "hello world"
SHORT_LIFE_S = 60.0
REPEATED_S = 2.0
"""A terminal that closes, and a service manager, may send several signals for one stop."""
MAX_SHORT_LIVES = 3
"""`serve` gives up after this many servers in a row that ended within SHORT_LIFE_S seconds."""


def serve(settings: Settings, options: Options, runtime: str) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Start a server that ends by itself again.

    If no precision of a model is built, build the first one and serve it. Build the others while
    the server runs; each is loaded when its checks pass.

    Raises:
        BuildError: a missing model could not be built.
        ServeError: the server could not be started, or ended soon after its start several times.
    """
    with _interrupted_by_signals() as interrupted:
        try:
            builds = _build_first(settings, options)
            log = settings.run(options.grpc_port) / "build.log"
            with background_builds.running(builds, options, log) as published:
                _keep_running(settings, options, runtime, builds, published, interrupted)
        except KeyboardInterrupt:
            console.print("stopped")


def _keep_running(
    settings: Settings,
    options: Options,
    runtime: str,
    builds: Sequence[background_builds.Build],
    published: Collection[str],
    interrupted: threading.Event,
) -> NoReturn:
    short_lives = 0
    while short_lives < MAX_SHORT_LIVES:
        began = time.monotonic()
        pending = {name for build in builds for name in build.ensembles} - {*published}
        built = _excluding(pending, settings, options)
        with _runtime(runtime, settings, built) as server:
            show(built, runtime)
            if waiting := sorted(pending - {*published}):
                console.print(f"  Being built, joins when checked: {', '.join(waiting)}")
            ended = _wait_for_end(server, interrupted)
        short_lives = short_lives + 1 if time.monotonic() - began < SHORT_LIFE_S else 0
        console.print(f"{ended}; it is started again")
    raise ServeError(f"{ended}; {short_lives} times soon after its start")


def exec_server(settings: Settings, options: Options) -> NoReturn:
    """Replace this process with Triton, as a container needs it; build nothing.

    Raises:
        ServeError: as `wheel.exec_server`.
    """
    if settings.backends is not None:
        wheel.exec_server(settings.repository, settings.backends, options)
    backends = settings.run(options.grpc_port) / "backends"
    with writing(backends, HOME, ServeError):
        wheel.lay_out(settings.python_backend, backends)
    wheel.exec_server(settings.repository, backends, options)


def _wait_for_end(server: wheel.Running, interrupted: threading.Event) -> str:
    """Wait until the server ends; return how. Kill a server that has lost a process.

    Raises:
        KeyboardInterrupt: a signal came. Python drops an exception that a signal's handler raises
            within a callback of a library, as while the sample is embedded.
    """
    while server.is_running():
        if interrupted.is_set():
            raise KeyboardInterrupt
        if server.has_lost_a_process():
            server.kill()
            return watch.CHILD_DIED
        time.sleep(watch.POLL_INTERVAL_S)
    return server.exit_reason()


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


def _build_first(settings: Settings, options: Options) -> list[background_builds.Build]:
    """Build the first precision of each requested catalogue model that has none; return the builds
    of the other precisions. If no model is named, the default model is requested.
    """
    remaining = []
    for model, precisions in _requested(options).items():
        missing = [
            precision
            for precision in precisions
            if not configs.is_built(settings.repository / served_name(model, precision))
        ]
        if missing == precisions:
            _build(model, missing.pop(0), settings)
        if missing:
            remaining.append(background_builds.Build(model, tuple(missing)))
    return remaining


def _build(model: str, precision: str, settings: Settings) -> None:
    with needs_extra("build"):
        from halimede_tools.build import plan  # only what is missing needs what builds
    plan.build(plan.build_request(model, precisions=(precision,)), settings)


def _requested(options: Options) -> dict[str, list[str]]:
    """Model of the catalogue → its requested precisions."""
    if not options.models:
        return {catalogue.DEFAULT: list(SUFFIXES)}
    requested = {
        model.name: [
            precision
            for precision in SUFFIXES
            if served_name(model.name, precision) in options.models
        ]
        for model in catalogue.models()
    }
    return {model: precisions for model, precisions in requested.items() if precisions}


def _excluding(pending: Collection[str], settings: Settings, options: Options) -> Options:
    """The options without the pending ensembles."""
    if not pending:
        return options
    requested = options.models or configs.models_to_load(settings.repository)
    return options.model_copy(
        update={"models": tuple(name for name in requested if name not in pending)}
    )


def show(options: Options, runtime: str) -> None:
    """Embed a sample; print its vector, the addresses, the cores and a curl command."""
    model = (options.models or (catalogue.DEFAULT,))[0]
    http, grpc = f"http://{options.http_address}", options.grpc_address
    with Embedder(grpc if options.tls_cert is None else http, model) as embedder:
        result = embedder.embed([SAMPLE])
    head = ", ".join(f"{value:.4f}" for value in result.vectors[0, :6])
    console.print(f"\n[bold green]ready[/]  {model}, {result.precision}, space {result.space}")
    console.print(f'  "{SAMPLE}" → [{head}, …] ({result.dims} numbers)')
    console.print(f"  gRPC     {grpc if options.tls_cert is None else f'grpcs://{grpc}'}")
    console.print(f"  HTTP     {http}")
    console.print(f"  metrics  http://{options.metrics_address}/metrics")
    if addresses.is_unspecified(options.host):
        console.print("  It listens on all addresses of this machine.")
    if runtime == "wheel":  # a container has a cgroup of its own
        console.print(f"  CPU      {cores.read()}")
    console.print(f"\n  {curl(http, model)}\n")
    console.print("  Ctrl-C stops it.")


def curl(http: str, model: str) -> str:
    """A curl command that embeds the sample over HTTP."""
    tensor = f'{{"name":"TEXT","datatype":"BYTES","shape":[1,1],"data":["{SAMPLE}"]}}'
    return f"curl -s {http}/v2/models/{model}/infer -d '{{\"inputs\":[{tensor}]}}'"


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[threading.Event]:
    """Raise KeyboardInterrupt on each signal that stops a server, and set the event. A repeated
    signal counts after REPEATED_S seconds: then it ends the server at once.
    """
    last = -math.inf
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > REPEATED_S:
            last = time.monotonic()
            interrupted.set()
            raise KeyboardInterrupt

    before = watch.on_stop(interrupt)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
