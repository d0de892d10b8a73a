"""`halimede`: embed texts, list a server's models, ask after its health.

Exit codes: 0 done; 1 an error of ours, said in one line on stderr; 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from halimede.embedder import Embedder
from halimede.results import Embeddings, ServedModel
from halimede.settings import Settings
from halimede.triton import Triton
from halimede_ops.errors import HalimedeError, InvalidInput, InvalidText

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

UNHEALTHY_LATENCY_S = 5.0
"""A probe slower than this is unhealthy."""

Url = Annotated[
    str | None, typer.Option(help="host:port for gRPC, http://host:port for HTTP. [HALIMEDE_URL]")
]
Model = Annotated[str | None, typer.Option(help="Name of the served model. [HALIMEDE_MODEL]")]
TimeoutS = Annotated[float | None, typer.Option(help="Seconds. [HALIMEDE_TIMEOUT_S]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def embed(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: lines of stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with one text a line.")] = None,
    input_type: Annotated[str | None, typer.Option(help="query, document, …")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Keep this many components.")] = None,
    npy: Annotated[Path | None, typer.Option(help="Write the vectors to this .npy file.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    model: Model = None,
    timeout_s: TimeoutS = None,
) -> None:
    """Embed texts given as arguments, in a file, or on stdin."""
    given = _texts(texts, file)
    with Embedder(url, model, timeout_s=timeout_s) as embedder:
        result = embedder.embed(given, input_type=input_type, dimensions=dimensions)
    if npy is not None:
        with npy.open("wb") as out:
            np.save(out, result.vectors)
    if as_json:
        print(json.dumps(_embeddings_json(result)))
    else:
        _print_embeddings(result, npy)


@app.command()
def models(
    verbose: Annotated[
        bool, typer.Option(help="Also the figures of the build's check, from HALIMEDE_REPOSITORY.")
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
    timeout_s: TimeoutS = None,
) -> None:
    """List the embedding models a server has ready."""
    settings = _settings(url=url, timeout_s=timeout_s)
    triton = Triton(settings.url, settings.timeout_s)
    rows = [_model_json(model, settings.repository, verbose) for model in triton.models()]
    triton.close()
    if as_json:
        print(json.dumps(rows))
    else:
        _print_table(rows)


@app.command()
def health(
    as_json: AsJson = False, url: Url = None, model: Model = None, timeout_s: TimeoutS = None
) -> None:
    """Embed a probe text; exit code 1 when the server is not there, not ready or too slow."""
    settings = _settings(url=url, model=model, timeout_s=timeout_s)
    report: dict[str, Any] = {"url": settings.url, "model": settings.model}
    try:
        with Embedder(settings.url, settings.model, timeout_s=settings.timeout_s) as embedder:
            embedder.model  # noqa: B018 - connect and describe before the clock starts
            began = time.perf_counter()
            result = embedder.embed(["health"])
            latency_s = time.perf_counter() - began
        healthy = latency_s <= UNHEALTHY_LATENCY_S and bool(np.isfinite(result.vectors).all())
        report |= {
            "healthy": healthy,
            "latency_ms": round(latency_s * 1000, 2),
            "precision": result.precision,
            "space": result.space,
        }
    except HalimedeError as error:
        report |= {"healthy": False, "error": str(error)}
    if as_json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{key:<11} {value}" for key, value in report.items()))
    if not report["healthy"]:
        raise typer.Exit(1)


def _texts(texts: list[str] | None, file: Path | None) -> list[str]:
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


def _settings(**flags: Any) -> Settings:
    return Settings(**{name: value for name, value in flags.items() if value is not None})


def _embeddings_json(result: Embeddings) -> dict[str, Any]:
    return {
        "model": result.model,
        "space": result.space,
        "precision": result.precision,
        "dims": result.dims,
        "embeddings": [
            {
                "index": index,
                "tokens": int(result.tokens[index]),
                "truncated": bool(result.truncated[index]),
                "embedding": [float(value) for value in vector],
            }
            for index, vector in enumerate(result.vectors)
        ],
    }


def _print_embeddings(result: Embeddings, npy: Path | None) -> None:
    print(f"{result.model} ({result.precision}, space {result.space}), {result.dims} dims")
    for index, vector in enumerate(result.vectors[:20]):
        head = ", ".join(f"{value:.4f}" for value in vector[:6])
        cut = f"  cut off at {result.max_tokens} tokens" if result.truncated[index] else ""
        print(f"{index:>5}  [{head}{', …' if result.dims > 6 else ''}]{cut}")
    if len(result) > 20:
        print(f"       … and {len(result) - 20} more; --json or --npy gives all")
    if npy is not None:
        print(f"wrote {npy}: {len(result)} × {result.dims} float32")


def _model_json(model: ServedModel, repository: Path, verbose: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": model.name,
        "precision": model.precision,
        "dims": model.dims,
        "max_tokens": model.max_tokens,
        "space": model.space,
    }
    if verbose:
        row |= _quality(repository / model.name, model.space)
    return row


def _quality(folder: Path, space: str) -> dict[str, Any]:
    """The figures of the build's check, when the served model is the one of the repository."""
    try:
        record = json.loads((folder / "1" / "quality.json").read_text())
    except (OSError, ValueError):
        return {}
    if record["space"] != space:
        return {}
    names = ("texts", "mean_cosine", "min_cosine", "invariance", "size_ratio")
    return {name: record[name] for name in names}


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no embedding model is ready")
        return
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*[str(row.get(name, "")) for name in columns])
    Console(width=200, highlight=False).print(table)


def main() -> None:
    """Run a command; one of our own errors is one line on stderr and exit code 1."""
    try:
        app()
    except HalimedeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
