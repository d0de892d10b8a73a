"""`halimede cache`."""

from __future__ import annotations

import typer

from halimede.cli import options
from halimede.embedder import Embedder
from halimede_ops.errors import InvalidConfig

app = typer.Typer(no_args_is_help=True, help="Show or clear the cache of a configuration.")


@app.command()
def stats(config: options.ConfigFile = None, as_json: options.AsJson = False) -> None:
    """Show the figures of each tier."""
    with _open(config) as embedder:
        tiers = embedder.stats()["cache"]["tiers"]
    rows = [{"tier": name, **figures} for name, figures in tiers.items()]
    options.print_rows(rows, as_json, "the cache has no tier")


@app.command()
def clear(config: options.ConfigFile = None, as_json: options.AsJson = False) -> None:
    """Delete every cached vector in every tier."""
    with _open(config) as embedder:
        embedder.clear_cache()
    options.print_facts({"cleared": True}, as_json)


def _open(config: options.ConfigFile) -> Embedder:
    embedder = Embedder(config=config)
    if embedder.config.cache is None:
        embedder.close()
        raise InvalidConfig("the configuration has no `cache`. Give --config a file that has one.")
    return embedder
