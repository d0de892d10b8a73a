"""`halimede cache`."""

from __future__ import annotations

import typer

from halimede.cli import options
from halimede.embedder import Embedder
from halimede_ops.errors import InvalidConfig

app = typer.Typer(no_args_is_help=True, help="Look after the cache of a configuration.")


@app.command()
def stats(config: options.ConfigFile = None, as_json: options.AsJson = False) -> None:
    """What each tier holds."""
    with _opened(config) as embedder:
        tiers = embedder.stats()["cache"]["tiers"]
    rows = [{"tier": name, **facts} for name, facts in tiers.items()]
    options.print_rows(rows, as_json, "the cache has no tier")


@app.command()
def clear(config: options.ConfigFile = None, as_json: options.AsJson = False) -> None:
    """Forget every cached vector in every tier."""
    with _opened(config) as embedder:
        embedder.clear_cache()
    options.print_facts({"cleared": True}, as_json)


def _opened(config: options.ConfigFile) -> Embedder:
    embedder = Embedder(config=config)
    if embedder.config.cache is None:
        embedder.close()
        raise InvalidConfig("there is no `cache` in the configuration. Give --config one with it.")
    return embedder
