"""`halimede tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from halimede.extras import needs_extra
from halimede_tools.cli.options import DEFAULT_MODEL, Model, Precisions, names
from halimede_tools.settings import Settings


def tune(
    model: Model = DEFAULT_MODEL,
    precisions: Precisions = "fp32,fp16,int8",
    seconds: Annotated[
        float, typer.Option(help="Time to measure, for all precisions together.")
    ] = 60.0,
) -> None:
    """Find the fastest settings of a model on this machine; write them into its configs."""
    with needs_extra("server,build"):
        from halimede_tools.bench import tune

        tune.tune(Settings(), model, names(precisions), seconds)
