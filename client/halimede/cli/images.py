"""`halimede embed-image` and `halimede search-images`."""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from halimede.cli import options, printing
from halimede.cli.contact_sheet import Hit, sheet
from halimede.embedder import Embedder
from halimede.inputs.archives import NamedImage, find_images, is_image
from halimede.results import Embeddings
from halimede_ops import vectors
from halimede_ops.errors import HalimedeError, InvalidInput, SpaceRefused
from halimede_ops.quantise import OutputType

Where = Annotated[str, typer.Argument(help="A folder of images, or a zip or tar archive.")]


def embed_image(
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders of them, zip or tar archives, https urls."),
    ],
    dimensions: options.Dimensions = None,
    output_type: options.OutputTypeName = "float32",
    ranges: options.Ranges = None,
    npy: options.Npy = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Embed images; exit code 1 if one fails, with its error on stderr."""
    names: list[str] = []
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        every_image = (image for where in images for image in find_images(where))
        parts = list(
            embedder.embed_images_iter(
                _recording(every_image, names),
                dimensions=dimensions,
                output_type=cast(OutputType, output_type),
                ranges=options.read_ranges(ranges),
                progress=True,
                errors="collect",
            )
        )
    if not parts:
        raise InvalidInput("there is no image. Give image files, folders, archives or urls.")
    if npy is not None:
        options.write_npy(npy, np.concatenate([part.vectors for part in parts]))
    failures = {index: error for part in parts for index, error in part.errors.items()}
    if as_json:
        print(json.dumps(_json(parts, names, failures)))
    else:
        _print(parts, names, npy)
    _print_errors(failures, names)
    if failures:
        raise typer.Exit(1)


def search_images(
    query: Annotated[str, typer.Argument(help="A text, or an image file.")],
    where: Where,
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
    names: list[str] = []
    failures: dict[int, HalimedeError] = {}
    hits: list[Hit] = []
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        of_query = embedder.embed_images(query) if _is_image(query) else embedder.embed(query)
        images = _recording(find_images(where), names)
        for part in embedder.embed_images_iter(images, progress=True, errors="collect"):
            failures |= part.errors
            hits = heapq.nlargest(
                top, [*hits, *_hits(part, of_query, names)], lambda hit: hit.cosine
            )
    _print_errors(failures, names)
    if html is not None:
        title = Path(query).name if _is_image(query) else query
        html.write_text(sheet(title, f"{len(names)} images · {of_query.model}", hits, where))
    _print_hits(hits, as_json)
    if html is not None and not as_json:
        print(f"wrote {html}")


def _recording(images: Iterable[NamedImage], names: list[str]) -> Iterator[NamedImage]:
    """Yield the images and append their names to `names`."""
    for image in images:
        names.append(image.name)
        yield image


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


def _json(
    parts: list[Embeddings], names: list[str], failures: Mapping[int, HalimedeError]
) -> dict[str, Any]:
    return {
        **printing.facts(parts[0]),
        "embeddings": [
            {
                "index": int(part.indices[row]),
                "name": names[part.indices[row]],
                **image._asdict(),
                "embedding": part.vectors[row].tolist(),
            }
            for part in parts
            for row, image in enumerate(part.images)
        ],
        "errors": [
            {
                "index": index,
                "name": names[index],
                "error": type(error).__name__,
                "message": str(error),
            }
            for index, error in failures.items()
        ],
    }


def _print(parts: list[Embeddings], names: list[str], npy: Path | None) -> None:
    rows = (
        (int(index), vector, f"{names[index]}  {image}")
        for part in parts
        for index, vector, image in zip(part.indices, part.vectors, part.images, strict=True)
    )
    printing.print_vectors(parts[0], rows, sum(map(len, parts)), npy)


def _print_hits(hits: list[Hit], as_json: bool) -> None:
    rows = [
        {"cosine": round(hit.cosine, 4), "name": hit.name, **hit.image._asdict()} for hit in hits
    ]
    options.print_rows(rows, as_json, "there is no image")


def _print_errors(failures: Mapping[int, HalimedeError], names: list[str]) -> None:
    """One line on stderr for each image that could not be embedded."""
    for index, error in failures.items():
        print(f"error: {names[index]}: {error}", file=sys.stderr)
