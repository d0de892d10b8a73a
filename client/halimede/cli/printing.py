"""How commands print vectors."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from halimede.results import Embeddings, Result

SHOWN_VECTORS = 20
"""Vectors printed; --json and --npy give all."""
SHOWN_COMPONENTS = 6
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control, format (also of direction), surrogates, line separators."""


def printable(text: str) -> str:
    """Return a text of others, such as a file name, with every control character replaced.

    A terminal obeys escape codes. Bytes of a name that are not UTF-8 cannot be printed.
    """
    return "".join(
        char if unicodedata.category(char) not in UNPRINTABLE else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def facts(result: Result) -> dict[str, Any]:
    """Return what identifies the model and the vectors of a result, for JSON."""
    model: dict[str, Any] = {
        "model": result.model,
        "provider": result.provider,
        "space": result.space,
        "precision": result.precision,
    }
    if isinstance(result, Embeddings):
        model |= {"dims": result.dims, "output_type": result.output_type}
    return model


def print_model(result: Result) -> None:
    """Print of which model a result is, and the length of its vectors if they have one."""
    dims = f", {result.dims} dims" if isinstance(result, Embeddings) else ""
    model = printable(result.model)
    print(f"{model} ({result.precision}, space {result.space}){dims}")


def print_lines(lines: Sequence[str], hint: str) -> None:
    """Print the first lines, each behind its index. `hint` says where the others are."""
    for index, line in enumerate(lines[:SHOWN_VECTORS]):
        print(f"{index:>5}{line}".rstrip())
    _print_more(len(lines), hint)


def first(components: Sequence[str]) -> str:
    """Return the first components in brackets."""
    more = ", …" if len(components) > SHOWN_COMPONENTS else ""
    return f"[{', '.join(components[:SHOWN_COMPONENTS])}{more}]"


def _print_more(count: int, hint: str) -> None:
    if count > SHOWN_VECTORS:
        print(f"       … and {count - SHOWN_VECTORS} more; {hint}")


def print_vectors(
    result: Embeddings, rows: Iterator[tuple[int, np.ndarray, str]], count: int, npy: Path | None
) -> None:
    """Print the first of `count` vectors, one a line: index, components, note.

    `result` says of which model they are; `npy` is the file that all were written to.
    """
    print_model(result)
    for index, vector, note in islice(rows, SHOWN_VECTORS):
        shown = first([f"{value:.4g}" for value in vector[: SHOWN_COMPONENTS + 1].tolist()])
        print(f"{index:>5}  {shown}  {printable(note)}".rstrip())
    _print_more(count, "--json or --npy gives all")
    if npy is not None:
        print(f"wrote {npy}: {count} × {result.dims} {result.output_type}")
