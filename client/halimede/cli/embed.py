"""`halimede embed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from halimede.cli import options, printing
from halimede.embedder import Embedder
from halimede.results import Embeddings
from halimede_ops.quantise import OutputType


def embed(
    texts: options.Texts = None,
    file: options.File = None,
    input_type: options.InputType = None,
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
    """Embed texts from the arguments, a file or stdin."""
    options.check_writable(npy, "--npy")
    lines = options.read_texts(texts, file)
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        result = embedder.embed(
            lines,
            input_type=input_type,
            dimensions=dimensions,
            output_type=cast(OutputType, output_type),
            ranges=options.read_ranges(ranges),
            progress=True,
        )
    if npy is not None:
        options.write_npy(npy, result.vectors)
    if as_json:
        print(json.dumps(_json(result)))
    else:
        _print(result, npy)


def _json(result: Embeddings) -> dict[str, Any]:
    return {
        **printing.facts(result),
        "embeddings": [
            {
                "index": index,
                "tokens": int(result.tokens[index]),
                "truncated": bool(result.truncated[index]),
                "embedding": vector.tolist(),
            }
            for index, vector in enumerate(result.vectors)
        ],
    }


def _print(result: Embeddings, npy: Path | None) -> None:
    notes = (f"cut off at {result.max_tokens} tokens" if cut else "" for cut in result.truncated)
    rows = zip(range(len(result)), result.vectors, notes, strict=True)
    printing.print_vectors(result, rows, len(result), npy)
