"""`halimede search-images`."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from halimede.cli import options
from halimede.cli.images.contact_sheet import Hit, sheet
from halimede.cli.images.embed_image import print_errors, recording
from halimede.embedder import Embedder
from halimede.inputs.archives import find_images, is_image
from halimede.results import Embeddings
from halimede_ops import vectors
from halimede_ops.errors import HalimedeError, SpaceRefused


def search_images(
    query: Annotated[str, typer.Argument(help="A text, or an image file.")],
    where: Annotated[str, typer.Argument(help="A folder of images, or a zip or tar archive.")],
    top: Annotated[int, typer.Option(min=1, help="Images to show.")] = 10,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the images shown, one HTML file.")
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Show the images nearest to a text or to another image."""
    options.check_writable(html, "--html")
    names: list[str] = []
    failures: dict[int, HalimedeError] = {}
    hits: list[Hit] = []
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        of_query = embedder.embed_images(query) if _is_image(query) else embedder.embed(query)
        images = recording(find_images(where), names)
        for part in embedder.embed_images_iter(images, progress=True, errors="collect"):
            failures |= part.errors
            hits = heapq.nlargest(
                top, [*hits, *_hits(part, of_query, names)], lambda hit: hit.cosine
            )
    print_errors(failures, names)
    if html is not None:
        title = Path(query).name if _is_image(query) else query
        html.write_text(
            sheet(title, f"{len(names)} images · {of_query.model}", hits, where), "utf-8"
        )
    _print_hits(hits, as_json)
    if html is not None and not as_json:
        print(f"wrote {html}")


def _is_image(query: str) -> bool:
    return is_image(query) and Path(query).is_file()


def _hits(part: Embeddings, query: Embeddings, names: list[str]) -> list[Hit]:
    """The images of a part with their cosines to the query's vector."""
    if part.space != query.space:
        raise SpaceRefused(
            f"the query's model {query.model} has space {query.space}, the images' model "
            f"{part.model} has space {part.space}: their vectors cannot be compared."
        )
    cosines = vectors.cosine(part.vectors, np.repeat(query.vectors, len(part), axis=0))
    return [
        Hit(int(index), names[index], float(cosine), image)
        for index, cosine, image in zip(part.indices, cosines, part.images, strict=True)
    ]


def _print_hits(hits: list[Hit], as_json: bool) -> None:
    rows = [
        {"cosine": round(hit.cosine, 4), "name": hit.name, **hit.image._asdict()} for hit in hits
    ]
    options.print_rows(rows, as_json, "there is no image")
