"""`halimede embed-image`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from halimede.cli import options, printing
from halimede.embedder import Embedder
from halimede.inputs.archives import NamedImage, find_images
from halimede.results import Embeddings
from halimede_ops.errors import HalimedeError, InvalidInput
from halimede_ops.quantise import OutputType


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
    options.check_writable(npy, "--npy")
    names: list[str] = []
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        every_image = (image for where in images for image in find_images(where))
        parts = list(
            embedder.embed_images_iter(
                recording(every_image, names),
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
    print_errors(failures, names)
    if failures:
        raise typer.Exit(1)


def recording(images: Iterable[NamedImage], names: list[str]) -> Iterator[NamedImage]:
    """Yield the images and append their names to `names`."""
    for image in images:
        names.append(image.name)
        yield image


def print_errors(failures: Mapping[int, HalimedeError], names: list[str]) -> None:
    """Print one line on stderr for each image that could not be embedded."""
    for index, error in failures.items():
        print(f"error: {printing.printable(names[index])}: {error}", file=sys.stderr)


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
