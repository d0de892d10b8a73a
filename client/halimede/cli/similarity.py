"""`halimede similarity`."""

from __future__ import annotations

from halimede.cli import options
from halimede.embedder import Embedder
from halimede_ops import vectors


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
