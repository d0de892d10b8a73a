"""`halimede store`."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import typer

from halimede.cli import options
from halimede.config.environment import Settings
from halimede.models import store

app = typer.Typer(no_args_is_help=True, help="Look after downloads and built files of models.")


@app.command()
def ls(as_json: options.AsJson = False) -> None:
    """List what the store holds, used last first."""
    settings = Settings()
    rows = [_row(model) for model in store.stored(settings.models, settings.repository)]
    options.print_rows(rows, as_json, "the store is empty")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One model; none: all.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Read every file again and compare its sha256; exit code 1 when one is damaged."""
    wrong = store.verify(Settings().models, name)
    rows = [{"model": model, "damaged": ", ".join(files)} for model, files in wrong.items()]
    options.print_rows(rows, as_json, "every file is as it was made")
    if wrong:
        raise typer.Exit(1)


@app.command()
def prune(
    limit_gib: Annotated[
        float | None, typer.Option(help="Size to come down to. [HALIMEDE_STORE_LIMIT_GIB]")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Evict the models used longest ago until the store fits; what is served stays."""
    settings = Settings()
    if limit_gib is not None:
        settings = settings.model_copy(update={"store_limit_gib": limit_gib})
    evicted = store.prune(settings.models, settings.repository, settings.store_limit_bytes)
    options.print_rows([_row(model) for model in evicted], as_json, "nothing had to go")


def _row(model: store.Stored) -> dict[str, Any]:
    used = datetime.datetime.fromtimestamp(model.used, datetime.UTC)
    return {
        "model": model.name,
        "mb": round(model.size_bytes / 1e6, 1),
        "used": used.strftime("%Y-%m-%d %H:%M UTC"),
        "steps": ", ".join(model.steps),
        "state": "building" if model.building else "served" if model.served else "",
    }
