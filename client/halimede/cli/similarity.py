"""`halimede similarity` and `halimede compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from halimede.cli import options
from halimede.embedder import Embedder
from halimede_ops import vectors
from halimede_ops.errors import InvalidInput


def similarity(
    texts: options.Texts = None,
    file: options.File = None,
    input_type: options.InputType = None,
    dimensions: options.Dimensions = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Print the cosine of each text with every other."""
    lines = options.read_texts(texts, file)
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        result = embedder.embed(lines, input_type=input_type, dimensions=dimensions)
    count = len(lines)
    cosines = [
        vectors.cosine(result.vectors, result.vectors[[row] * count]).round(6).tolist()
        for row in range(count)
    ]
    if as_json:
        facts = {"model": result.model, "space": result.space, "precision": result.precision}
        options.print_facts({**facts, "similarity": cosines}, as_json=True)
    else:
        print("\n".join("  ".join(f"{value:7.4f}" for value in row) for row in cosines))


def compare(
    first: Annotated[str, typer.Argument(help="A served model, or a model of --config.")],
    second: Annotated[str, typer.Argument(help="Another model.")],
    file: options.File = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Compare two models by the cosine of their vectors of the same texts, from a file or stdin."""
    texts = options.read_texts(None, file)
    if not texts:
        raise InvalidInput("there is no text to compare on. Give --file, or lines on stdin.")
    results = []
    for model in (first, second):
        with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
            results.append(embedder.embed(texts))
    a, b = results
    if a.dims != b.dims:
        raise InvalidInput(
            f"{first} has {a.dims} dims and {second} has {b.dims}. Compare models of the same dims."
        )
    cosines = vectors.cosine(a.vectors, b.vectors)
    options.print_facts(
        {
            "texts": len(texts),
            "models": [a.model, b.model],
            "spaces": [a.space, b.space],
            "precisions": [a.precision, b.precision],
            "comparable": a.space == b.space,
            "mean_cosine": round(float(cosines.mean()), 6),
            "min_cosine": round(float(cosines.min()), 6),
        },
        as_json,
    )
