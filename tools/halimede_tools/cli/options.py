"""Options that several verbs share, and the check for extras."""

from __future__ import annotations

from typing import Annotated

import typer

from halimede.models import catalogue

Model = Annotated[str, typer.Option(help="Name of a served model, without a precision.")]
Precisions = Annotated[str, typer.Option(help="Separated by commas.")]
DEFAULT_MODEL = catalogue.DEFAULT


def names(listed: str) -> tuple[str, ...]:
    """Split names that are separated by commas."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())
