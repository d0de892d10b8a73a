"""`halimede fusion`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halimede.extras import needs_extra
from halimede_tools.cli.options import DEFAULT_MODEL
from halimede_tools.settings import Settings

app = typer.Typer(no_args_is_help=True, help="One vector for a text and an image.")
TextModel = Annotated[str, typer.Option("--text", help="Model of the repository for texts.")]
ImageModel = Annotated[str, typer.Option("--image", help="Model of the repository for images.")]


@app.command()
def untrained(
    image: ImageModel,
    text: TextModel = DEFAULT_MODEL,
    name: Annotated[str, typer.Option(help="Name to serve it under.")] = "multimodal",
    text_weight: Annotated[
        float, typer.Option(help="Weight of the text in a similarity, from 0 to 1.")
    ] = 0.5,
) -> None:
    """Write an orthonormal projection, which keeps the weighted sum of both similarities."""
    with needs_extra("build"):
        from halimede_tools.build.fusion import write_untrained

        write_untrained(name, text, image, text_weight, Settings().repository)


@app.command()
def fit(
    pairs: Annotated[Path, typer.Argument(help='Lines of {"text": [a, b], "image": [a, b]}.')],
    image: ImageModel,
    text: TextModel = DEFAULT_MODEL,
    name: Annotated[str, typer.Option(help="Name to serve it under.")] = "multimodal",
) -> None:
    """Fit the projection to pairs of views of one object; print its retrieval score."""
    with needs_extra("build"):
        from halimede_tools.build.fusion import write_fitted

        write_fitted(name, text, image, pairs, Settings().repository)
