"""How commands print vectors."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from halimede.results import Embeddings

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


def facts(result: Embeddings) -> dict[str, Any]:
    """Return what identifies the model and the vectors of a result, for JSON."""
    return {
        "model": result.model,
        "provider": result.provider,
        "space": result.space,
        "precision": result.precision,
        "dims": result.dims,
        "output_type": result.output_type,
    }


def print_vectors(
    result: Embeddings, rows: Iterator[tuple[int, np.ndarray, str]], count: int, npy: Path | None
) -> None:
    """Print the first of `count` vectors, one a line: index, components, note.

    `result` says of which model they are; `npy` is the file that all were written to.
    """
    print(
        f"{printable(result.model)} ({result.precision}, space {result.space}), {result.dims} dims"
    )
    for index, vector, note in islice(rows, SHOWN_VECTORS):
        head = ", ".join(f"{value:.4g}" for value in vector[:SHOWN_COMPONENTS].tolist())
        more = ", …" if len(vector) > SHOWN_COMPONENTS else ""
        print(f"{index:>5}  [{head}{more}]  {printable(note)}".rstrip())
    if count > SHOWN_VECTORS:
        print(f"       … and {count - SHOWN_VECTORS} more; --json or --npy gives all")
    if npy is not None:
        print(f"wrote {npy}: {count} × {result.dims} {result.output_type}")
