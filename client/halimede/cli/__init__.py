"""`halimede`: build, serve and use embedding models.

Exit codes: 0 done; 1 an error that the same command meets again; 2 wrong usage; 3 an error that
may pass, such as a server that does not answer. An error is one line on stderr.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from typing import Annotated

import typer

from halimede.cli import cache, configuration, embed, images, service, similarity, store
from halimede_ops.errors import HalimedeError

MAY_PASS = 3
INTERRUPTED = 130
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
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None: ...


if importlib.util.find_spec(TOOLS):
    importlib.import_module(f"{TOOLS}.cli").register(app)
app.command()(embed.embed)
app.command()(images.embed_image)
app.command()(images.search_images)
app.command()(similarity.similarity)
app.command()(similarity.compare)
app.command()(service.models)
app.command()(service.health)
app.command()(service.monitor)
app.add_typer(cache.app, name="cache")
app.add_typer(store.app, name="store")
app.add_typer(configuration.app, name="config")


def main() -> None:
    """Run a command; one of our own errors is one line on stderr."""
    try:
        app()
    except HalimedeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MAY_PASS if error.retryable else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
