"""Options, inputs and tables that several commands share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from halimede.cli.printing import printable
from halimede_ops.errors import InvalidInput
from halimede_ops.lines import read_lines

Url = Annotated[
    str | None,
    typer.Option(help="Server: host:port for gRPC, http://host:port for HTTP. [HALIMEDE_URL]"),
]
Model = Annotated[
    str | None, typer.Option(help="A served model, or a model of --config. [HALIMEDE_MODEL]")
]
TimeoutS = Annotated[
    float | None, typer.Option(help="Longest wait for a request, in seconds. [HALIMEDE_TIMEOUT_S]")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file. [HALIMEDE_CONFIG]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Texts = Annotated[list[str] | None, typer.Argument(help="Texts. Default: the lines of stdin.")]
File = Annotated[Path | None, typer.Option(help="File with one text per line.")]
InputType = Annotated[
    str | None, typer.Option(help="Input type of the model, such as query or document.")
]
OutputTypeName = Annotated[
    str, typer.Option("--output-type", help="float32, float16, int8, uint8, binary, ubinary.")
]
Ranges = Annotated[
    Path | None,
    typer.Option(help="For int8 and uint8: .npy file [2, dims] of lowest and highest values."),
]
Npy = Annotated[Path | None, typer.Option(help="Write the vectors to this .npy file.")]
Dimensions = Annotated[
    int | None, typer.Option(help="Truncate the vectors to this many components.")
]


def read_texts(texts: list[str] | None, file: Path | None) -> list[str]:
    """Return the texts given as arguments, else the lines of a file or of stdin.

    Raises:
        InvalidInput: texts and a file are both given, or the file cannot be read.
        InvalidText: the file or stdin is not UTF-8.
    """
    if texts and file:
        raise InvalidInput("texts and --file are both given; give one of them.")
    if texts:
        return texts
    if file:
        return read_lines(file, "--file")
    if sys.stdin is None:
        raise InvalidInput("stdin is closed; give texts, --file, or lines on stdin.")
    return read_lines(sys.stdin.buffer, "stdin")


def read_ranges(ranges: Path | None) -> np.ndarray | None:
    """Return the ranges in a .npy file.

    Raises:
        InvalidInput: the file cannot be read.
    """
    if ranges is None:
        return None
    try:
        return np.load(ranges)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--ranges cannot be read ({type(error).__name__}).") from None


def check_writable(path: Path | None, option: str) -> None:
    """Check, before the work, that a file can be written. An existing file stays as it is.

    Raises:
        InvalidInput: it cannot.
    """
    if path is None:
        return
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        reason = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise InvalidInput(f"{option} cannot be written: {reason}.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidInput(f"{option} cannot be written: permission denied.")


def write_npy(npy: Path, vectors: np.ndarray) -> None:
    """Write vectors to this file.

    Raises:
        InvalidInput: it cannot be written.
    """
    try:
        with npy.open("wb") as out:  # given a path, numpy adds the suffix .npy
            np.save(out, vectors)
    except OSError as error:
        raise InvalidInput(f"--npy cannot be written: {error.strerror or 'disk full'}.") from None


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as JSON, or one per line."""
    if as_json:
        print(json.dumps(facts))
        return
    width = max(len(key) for key in facts)
    print("\n".join(f"{key:<{width}}  {printable(str(value))}" for key, value in facts.items()))


def print_rows(rows: list[dict[str, Any]], as_json: bool, empty_message: str) -> None:
    """Print rows as JSON or as a table; without rows the table is `empty_message`."""
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print(empty_message)
        return
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*[Text(printable(str(row.get(name, "")))) for name in columns])
    Console(width=200, highlight=False).print(table)
