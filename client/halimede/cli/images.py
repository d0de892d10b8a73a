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

from halimede.cli import options
from halimede.cli.contact_sheet import Hit, sheet
from halimede.embedder import Embedder
from halimede.inputs.archives import NamedImage, find_images, is_image
from halimede.results import Embeddings
from halimede_ops import vectors
from halimede_ops.errors import HalimedeError, InvalidInput, SpaceRefused
from halimede_ops.quantise import OutputType

SHOWN = 20
"""Vectors printed; --json and --npy give all."""

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
    """Embed images; exit code 1 when one could not be, with its error on stderr."""
    names: list[str] = []
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        found = (one for where in images for one in find_images(where))
        parts = list(
            embedder.embed_images_iter(
                _noting(found, names),
                dimensions=dimensions,
                output_type=cast(OutputType, output_type),
                ranges=options.read_ranges(ranges),
                progress=True,
                errors="collect",
            )
        )
    if not parts:
        raise InvalidInput("there is no image.")
    if npy is not None:
        options.write_npy(npy, np.concatenate([part.vectors for part in parts]))
    wrong = {place: error for part in parts for place, error in part.errors.items()}
    if as_json:
        print(json.dumps(_json(parts, names, wrong)))
    else:
        _print(parts, names, npy)
    _tell(wrong, names)
    if wrong:
        raise typer.Exit(1)


def search_images(
    query: Annotated[str, typer.Argument(help="A text, or an image file.")],
    where: Where,
    top: Annotated[int, typer.Option(min=1, help="Images to show.")] = 10,
    html: Annotated[
        Path | None, typer.Option(help="Write a contact sheet of them to this file.")
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Show the images that are nearest to a text or to another image."""
    names: list[str] = []
    wrong: dict[int, HalimedeError] = {}
    hits: list[Hit] = []
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        asked = embedder.embed_images(query) if _is_image(query) else embedder.embed(query)
        found = _noting(find_images(where), names)
        for part in embedder.embed_images_iter(found, progress=True, errors="collect"):
            wrong |= part.errors
            hits = heapq.nlargest(top, [*hits, *_hits(part, asked, names)], lambda hit: hit.cosine)
    _tell(wrong, names)
    if html is not None:
        title = Path(query).name if _is_image(query) else query
        html.write_text(sheet(title, f"{len(names)} images · {asked.model}", hits, where))
    _print_hits(hits, as_json)
    if html is not None and not as_json:
        print(f"wrote {html}")


def _noting(found: Iterable[NamedImage], names: list[str]) -> Iterator[NamedImage]:
    """What is found, its names noted as it is taken."""
    for one in found:
        names.append(one.name)
        yield one


def _is_image(query: str) -> bool:
    return is_image(query) and Path(query).is_file()


def _hits(part: Embeddings, asked: Embeddings, names: list[str]) -> list[Hit]:
    """The images of a part with their cosines to what is asked."""
    if part.space != asked.space:
        raise SpaceRefused(
            f"{asked.model} has space {asked.space} and {part.model} {part.space}: their vectors "
            "cannot be compared."
        )
    cosines = vectors.cosine(part.vectors, np.repeat(asked.vectors, len(part), axis=0))
    return [
        Hit(int(place), names[place], float(cosine), image)
        for place, cosine, image in zip(part.indices, cosines, part.images, strict=True)
    ]


def _json(
    parts: list[Embeddings], names: list[str], wrong: Mapping[int, HalimedeError]
) -> dict[str, Any]:
    first = parts[0]
    return {
        "model": first.model,
        "provider": first.provider,
        "space": first.space,
        "precision": first.precision,
        "dims": first.dims,
        "output_type": first.output_type,
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
                "index": place,
                "name": names[place],
                "error": type(error).__name__,
                "message": str(error),
            }
            for place, error in wrong.items()
        ],
    }


def _print(parts: list[Embeddings], names: list[str], npy: Path | None) -> None:
    first, count = parts[0], sum(map(len, parts))
    print(f"{first.model} ({first.precision}, space {first.space}), {first.dims} dims")
    rows = ((part, row) for part in parts for row in range(len(part)))
    for (part, row), _ in zip(rows, range(SHOWN), strict=False):
        image, vector = part.images[row], part.vectors[row]
        head = ", ".join(f"{value:.4g}" for value in vector[:6].tolist())
        place = int(part.indices[row])
        print(f"{place:>5}  [{head}{', …' if len(vector) > 6 else ''}]  {names[place]}  {image}")
    if count > SHOWN:
        print(f"       … and {count - SHOWN} more; --json or --npy gives all")
    if npy is not None:
        print(f"wrote {npy}: {count} × {first.dims} {first.output_type}")


def _print_hits(hits: list[Hit], as_json: bool) -> None:
    rows = [
        {"cosine": round(hit.cosine, 4), "name": hit.name, **hit.image._asdict()} for hit in hits
    ]
    options.print_rows(rows, as_json, "there is no image")


def _tell(wrong: Mapping[int, HalimedeError], names: list[str]) -> None:
    """One line on stderr for each image that could not be embedded."""
    for place, error in wrong.items():
        print(f"error: {names[place]}: {error}", file=sys.stderr)
