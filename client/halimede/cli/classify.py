"""`halimede classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halimede.classifier import Classifier
from halimede.cli import options, printing
from halimede.results import Classification
from halimede_ops.lines import read_lines


def classify(
    texts: options.Texts = None,
    file: options.File = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="File with one second text per line, for models of two texts."),
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Score texts from the arguments, a file or stdin for each label of a classifier."""
    firsts = options.read_texts(texts, file)
    seconds = None if pairs is None else read_lines(pairs, "--pairs")
    with Classifier(model, url=url, config=config, timeout_s=timeout_s) as classifier:
        result = classifier.classify(firsts, seconds, progress=True)
    if as_json:
        shown = {**printing.facts(result), "labels": list(result.labels), "classes": _rows(result)}
        options.print_facts(shown, as_json=True)
        return
    printing.print_model(result)
    for index, (label, scores) in enumerate(zip(result.best, result.scores, strict=True)):
        print(f"{index:>5}  {scores.max():9.6f}  {printing.printable(label)}")


def _rows(result: Classification) -> list[dict[str, object]]:
    return [
        {
            "index": index,
            "label": label,
            "scores": result.scores[index].tolist(),
            "tokens": int(result.tokens[index]),
            "truncated": bool(result.truncated[index]),
        }
        for index, label in enumerate(result.best)
    ]
