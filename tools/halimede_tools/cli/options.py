"""Options that several verbs share, and the check for extras."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from halimede.models import catalogue
from halimede_ops.errors import MissingExtra

Model = Annotated[str, typer.Option(help="Name of a served model, without a precision.")]
Precisions = Annotated[str, typer.Option(help="Separated by commas.")]
DEFAULT_MODEL = catalogue.DEFAULT


def names(listed: str) -> tuple[str, ...]:
    """Split names that are separated by commas."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Run code that needs an extra of the package.

    Raises:
        MissingExtra: a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingExtra):
            raise
        raise MissingExtra(
            f"{error.name} is not installed. Run: pip install 'halimede[{name}]'"
        ) from None
