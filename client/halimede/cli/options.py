"""What several commands share: options, texts, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from halimede_ops.errors import InvalidInput, InvalidText

Url = Annotated[
    str | None, typer.Option(help="host:port for gRPC, http://host:port for HTTP. [HALIMEDE_URL]")
]
Model = Annotated[
    str | None, typer.Option(help="A served model, or one of --config. [HALIMEDE_MODEL]")
]
TimeoutS = Annotated[float | None, typer.Option(help="Seconds a request. [HALIMEDE_TIMEOUT_S]")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="File. [HALIMEDE_CONFIG]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Texts = Annotated[list[str] | None, typer.Argument(help="Texts; none: lines of stdin.")]
File = Annotated[Path | None, typer.Option(help="File with one text a line.")]
InputType = Annotated[str | None, typer.Option(help="query, document, …")]
OutputTypeName = Annotated[
    str, typer.Option("--output-type", help="float32, float16, int8, uint8, binary, ubinary.")
]
Ranges = Annotated[
    Path | None, typer.Option(help="For int8 and uint8: .npy of [2, dims], low and high.")
]
Npy = Annotated[Path | None, typer.Option(help="Write the vectors to this .npy file.")]
Dimensions = Annotated[int | None, typer.Option(help="Keep this many components.")]


def read_texts(texts: list[str] | None, file: Path | None) -> list[str]:
    """The texts given as arguments, or the lines of a file or of stdin."""
    if texts and file:
        raise InvalidInput("texts and --file are both given; give one of them.")
    if texts:
        return texts
    try:
        raw = file.read_bytes() if file else sys.stdin.buffer.read()
    except OSError as error:
        raise InvalidInput(f"--file cannot be read: {error.strerror}.") from None
    try:
        return raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        source = "--file" if file else "stdin"
        raise InvalidText(f"{source} is not valid UTF-8 (byte {error.start}).") from None


def read_ranges(ranges: Path | None) -> np.ndarray | None:
    """The ranges in a file."""
    if ranges is None:
        return None
    try:
        return np.load(ranges)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--ranges cannot be read ({type(error).__name__}).") from None


def write_npy(npy: Path, vectors: np.ndarray) -> None:
    """Write vectors under this very name."""
    with npy.open("wb") as out:  # a path would get a suffix
        np.save(out, vectors)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Facts as JSON, or one a line."""
    if as_json:
        print(json.dumps(facts))
        return
    width = max(len(key) for key in facts)
    print("\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))


def print_rows(rows: list[dict[str, Any]], as_json: bool, none: str) -> None:
    """Rows as JSON, or as a table; `none` is said when there are none."""
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print(none)
        return
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*[str(row.get(name, "")) for name in columns])
    Console(width=200, highlight=False).print(table)
