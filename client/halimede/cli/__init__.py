"""`halimede`: build, serve and use models of texts and images.

Exit codes: 0 done; 1 an error that the same command meets again; 2 wrong usage; 3 an error that
may pass, such as a server that does not answer. An error is one line on stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import Annotated

import typer

from halimede.cli import (
    cache,
    classify,
    compare,
    configuration,
    embed,
    health,
    models,
    monitor,
    rerank,
    similarity,
    store,
)
from halimede.cli.datasets import bulk
from halimede.cli.gateways import gateway, gateway_key
from halimede.cli.images import embed_image, search_images
from halimede.cli.indexes import index
from halimede.cli.printing import printable
from halimede_engine import cores
from halimede_ops.errors import HalimedeError

MAY_PASS = 3
INTERRUPTED = 130
BROKEN_PIPE = 141
"""As a shell reports a program that SIGPIPE ended."""
TOOLS = "halimede_tools"
"""Package of the verbs that build, serve and measure."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"halimede {importlib.metadata.version('halimede')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
]


@app.callback()
def _options(version: Version = False) -> None: ...


if importlib.util.find_spec(TOOLS):
    importlib.import_module(f"{TOOLS}.cli").register(app)
app.command()(embed.embed)
app.command()(embed_image.embed_image)
app.command()(search_images.search_images)
app.command()(similarity.similarity)
app.command()(compare.compare)
app.command()(rerank.rerank)
app.command()(classify.classify)
app.command()(bulk.bulk)
app.command()(gateway.gateway)
app.command()(gateway_key.gateway_key)
app.command()(models.models)
app.command()(health.health)
app.command()(monitor.monitor)
app.add_typer(index.app, name="index")
app.add_typer(cache.app, name="cache")
app.add_typer(store.app, name="store")
app.add_typer(configuration.app, name="config")


def main() -> None:
    """Run a command; one of our own errors, or output that cannot be written, is one line."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: it was closed before the program began
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for name, threads in cores.library_threads(cores.read()).items():
        os.environ.setdefault(name, threads)
    try:
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has enough. The interpreter would flush again at the end, and fail again.
        _discard_output()
        code = BROKEN_PIPE
    except OSError as error:
        _discard_output()
        _report(f"error: the output cannot be written: {error.strerror}.")
        code = 1
    sys.exit(code)


def _run() -> int:
    """Run a command and return its exit code."""
    try:
        app()
    except HalimedeError as error:
        _report(f"error: {printable(str(error))}")
        return MAY_PASS if error.retryable else 1
    except OSError as error:
        if error.filename is None:  # the output
            raise
        path = printable(os.fsdecode(error.filename))
        _report(f"error: {path} cannot be used: {error.strerror}.")
        return 1
    except KeyboardInterrupt:
        _report("interrupted")
        return INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _report(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _discard_output() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
