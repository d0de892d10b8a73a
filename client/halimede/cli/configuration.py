"""`halimede config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halimede import providers
from halimede.cli import options
from halimede.config.file import load

app = typer.Typer(no_args_is_help=True, help="Check a configuration file; explain its keys.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML file.")], as_json: options.AsJson = False
) -> None:
    """Check a configuration file and open its providers, without a request to them."""
    config = load(file)
    chain = config.chain()
    for model in chain:
        providers.open_providers(model)
    if config.cache is not None:
        config.cache.open()
    facts = {
        "chain": [f"{model.provider}:{model.model_id}" for model in chain],
        "cache": config.cache is not None,
        "development": config.development,
    }
    options.print_facts({"ok": True, **facts}, as_json)


@app.command()
def reference() -> None:
    """Print every key with its type, default and meaning, in Markdown."""
    from halimede.config.reference import markdown

    print(markdown(), end="")
