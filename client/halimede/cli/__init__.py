"""`halimede`: embed and compare texts and images, look after models, cache and configuration.

Exit codes: 0 done; 1 an error that the same command meets again; 2 wrong usage; 3 an error that
may pass, such as a server that is not there. An error is one line on stderr.
"""

from __future__ import annotations

import sys

import typer

from halimede.cli import cache, configuration, embed, images, service, similarity, store
from halimede_ops.errors import HalimedeError

MAY_PASS = 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
)
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


if __name__ == "__main__":
    main()
