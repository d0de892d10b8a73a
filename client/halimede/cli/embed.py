"""`halimede embed`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from halimede.cli import options, printing
from halimede.embedder import Embedder, EmbedOptions
from halimede.results import Embeddings, MultiEmbeddings, Result, SparseEmbeddings
from halimede_ops.errors import InvalidInput
from halimede_ops.quantise import OutputType


def embed(
    texts: options.Texts = None,
    file: options.File = None,
    input_type: options.InputType = None,
    dimensions: options.Dimensions = None,
    output_type: options.OutputTypeName = "float32",
    ranges: options.Ranges = None,
    npy: options.Npy = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Print weights of tokens instead of vectors.")
    ] = False,
    multi: Annotated[
        bool, typer.Option("--multi", help="Print a vector for each token of a text.")
    ] = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Embed texts from the arguments, a file or stdin."""
    options.check_writable(npy, "--npy")
    for_vectors: EmbedOptions = {
        "dimensions": dimensions,
        "output_type": cast(OutputType, output_type),
        "ranges": options.read_ranges(ranges),
    }
    if sparse or multi:
        _check_alone(sparse and multi, for_vectors, npy)
    lines = options.read_texts(texts, file)
    result: Embeddings | SparseEmbeddings | MultiEmbeddings
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        if sparse:
            result = embedder.embed_sparse(lines, input_type=input_type, progress=True)
        elif multi:
            result = embedder.embed_multi(lines, input_type=input_type, progress=True)
        else:
            result = embedder.embed(lines, input_type=input_type, progress=True, **for_vectors)
    if npy is not None and isinstance(result, Embeddings):
        options.write_npy(npy, result.vectors)
    if as_json:
        print(json.dumps({**printing.facts(result), "embeddings": _json(result)}))
    else:
        _print(result, npy)


def _check_alone(both: bool, for_vectors: EmbedOptions, npy: Path | None) -> None:
    """Check that no option is given which only one vector for each text has.

    Raises:
        InvalidInput: one is.
    """
    if both:
        raise InvalidInput("--sparse and --multi are both given; give one of them.")
    given = for_vectors["dimensions"], for_vectors["ranges"], npy
    if any(value is not None for value in given) or for_vectors["output_type"] != "float32":
        raise InvalidInput(
            "--sparse and --multi take no --dimensions, --output-type, --ranges or --npy; --json "
            "prints all numbers."
        )


def _json(result: Embeddings | SparseEmbeddings | MultiEmbeddings) -> list[dict[str, Any]]:
    if isinstance(result, SparseEmbeddings):
        rows = zip(result.ids, result.weights, strict=True)
        values = [{"ids": ids.tolist(), "weights": weights.tolist()} for ids, weights in rows]
    else:
        name = "vectors" if isinstance(result, MultiEmbeddings) else "embedding"
        values = [{name: vector.tolist()} for vector in result.vectors]
    return [
        {
            "index": index,
            "tokens": int(result.tokens[index]),
            "truncated": bool(result.truncated[index]),
            **value,
        }
        for index, value in enumerate(values)
    ]


def _print(result: Embeddings | SparseEmbeddings | MultiEmbeddings, npy: Path | None) -> None:
    notes = _notes(result)
    if isinstance(result, Embeddings):
        rows = zip(range(len(result)), result.vectors, notes, strict=True)
        printing.print_vectors(result, rows, len(result), npy)
        return
    if isinstance(result, SparseEmbeddings):
        shown = [
            printing.first([f"{i}: {w:.4g}" for i, w in zip(ids, weights, strict=True)])
            for ids, weights in zip(result.ids, result.weights, strict=True)
        ]
    else:
        shown = [" × ".join(map(str, matrix.shape)) for matrix in result.vectors]
    printing.print_model(result)
    lines = [f"  {text}  {note}" for text, note in zip(shown, notes, strict=True)]
    printing.print_lines(lines, "--json gives all")


def _notes(result: Result) -> Sequence[str]:
    return [f"cut off at {result.max_tokens} tokens" if cut else "" for cut in result.truncated]
