"""`halimede store`."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import typer

from halimede.cli import options
from halimede.config.environment import Settings
from halimede.models import store

app = typer.Typer(no_args_is_help=True, help="List, verify or prune downloaded and built models.")


@app.command()
def ls(as_json: options.AsJson = False) -> None:
    """List the models in the store, the last built first."""
    settings = Settings()
    rows = [_row(model) for model in store.stored(settings.models, settings.repository)]
    options.print_rows(rows, as_json, "the store is empty")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="A model. Default: all models.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Read every file and compare its sha256; exit code 1 if one is damaged."""
    damaged = store.verify(Settings().models, name)
    rows = [{"model": model, "damaged": ", ".join(files)} for model, files in damaged.items()]
    options.print_rows(rows, as_json, "no file is damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def prune(
    limit_gib: Annotated[
        float | None,
        typer.Option(help="Largest size in GiB. [HALIMEDE_STORE_LIMIT_GIB]"),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Delete the models built longest ago until the store fits; served models stay."""
    settings = Settings()
    if limit_gib is not None:
        settings = settings.model_copy(update={"store_limit_gib": limit_gib})
    evicted = store.prune(settings.models, settings.repository, settings.store_limit_bytes)
    options.print_rows([_row(model) for model in evicted], as_json, "nothing had to be deleted")


def _row(model: store.Stored) -> dict[str, Any]:
    built = datetime.datetime.fromtimestamp(model.last_built_s, datetime.UTC)
    return {
        "model": model.name,
        "mb": round(model.size_bytes / 1e6, 1),
        "used": built.strftime("%Y-%m-%d %H:%M UTC"),
        "steps": ", ".join(model.steps),
        "state": "building" if model.building else "served" if model.served else "",
    }
