"""`halimede soak`."""

from __future__ import annotations

from typing import Annotated

import typer

from halimede.extras import needs_extra
from halimede_tools.cli.options import DEFAULT_MODEL, Model, Precisions, names
from halimede_tools.settings import Settings


def soak(
    model: Model = DEFAULT_MODEL,
    precisions: Precisions = "int8",
    requests: Annotated[
        int, typer.Option(min=200, help="500,000 take 25 min on 2 cores.")
    ] = 500_000,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 32,
) -> None:
    """Send mixed requests; check every answer, memory and drift; write the report."""
    with needs_extra("server,build"):
        from halimede_tools.bench import soak

        soak.soak(Settings(), model, names(precisions), requests, concurrency, soak.REPORT)
