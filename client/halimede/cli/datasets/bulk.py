"""`halimede bulk`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from halimede.cli import options
from halimede.cli.datasets import progress
from halimede.config.resolve import in_process as run_in_process
from halimede.config.resolve import resolve
from halimede.config.validation import validated
from halimede.embedder import Embedder
from halimede_ops.errors import InvalidInput

if TYPE_CHECKING:
    from halimede.bulk import BulkOptions, Manifest, Shard

Sources = Annotated[
    list[str],
    typer.Argument(help="Files, folders, patterns, URLs: Parquet, JSON Lines, CSV, text."),
]
Out = Annotated[str, typer.Option(help="Folder or URL of the Parquet files to write.")]
TextColumn = Annotated[str | None, typer.Option(help="Column with the texts. Default: text.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column with images: bytes, paths or URLs.")]
IdColumn = Annotated[str | None, typer.Option(help="Column that identifies a row. Written too.")]
Keep = Annotated[str, typer.Option(help="Further columns to write, as a,b,c; * is all.")]
Errors = Annotated[
    str,
    typer.Option(help="raise: a row that fails ends the job. collect: it gets an error."),
]
Dedupe = Annotated[bool, typer.Option("--dedupe", help="Embed equal texts once.")]
Chunk = Annotated[
    int | None, typer.Option("--chunk", help="A vector for each chunk of so many tokens.")
]
Overlap = Annotated[int, typer.Option("--overlap", help="Tokens that neighbouring chunks share.")]
Late = Annotated[bool, typer.Option("--late", help="Pool chunks from one pass over the text.")]
RowsPerFile = Annotated[
    int | None, typer.Option(min=1, help="Rows of a source in one file. [32768]")
]
ShardOf = Annotated[str, typer.Option("--shard", help="Do only this share, such as 2/8.")]
EngineName = Annotated[str, typer.Option("--engine", help="local, or ray: on a Ray cluster.")]
Actors = Annotated[
    str | None, typer.Option(help="Actors of Ray: 4, or 1-64. Default: from one to all that fit.")
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="Run the model of HALIMEDE_REPOSITORY here.")
]


def bulk(
    context: typer.Context,
    sources: Sources,
    out: Out,
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    id_column: IdColumn = None,
    keep: Keep = "",
    input_type: options.InputType = None,
    dimensions: options.Dimensions = None,
    output_type: options.OutputTypeName = "float32",
    ranges: options.Ranges = None,
    errors: Errors = "raise",
    dedupe: Dedupe = False,
    chunk_tokens: Chunk = None,
    chunk_overlap: Overlap = 0,
    late: Late = False,
    rows_per_file: RowsPerFile = None,
    shard: ShardOf = "1/1",
    engine: EngineName = "local",
    actors: Actors = None,
    in_process: InProcess = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Embed a dataset into Parquet files. The same command goes on where it was ended."""
    from halimede import bulk as datasets

    asked = _options(datasets.BulkOptions, context.params)
    resolved = resolve(config, url=url, model=model, timeout_s=timeout_s)
    if in_process:
        resolved = run_in_process(resolved)
    with Embedder(config=resolved) as embedder, progress.shown("embedding") as show:
        manifest = datasets.run(
            embedder,
            sources,
            out,
            asked,
            dedupe=dedupe,
            shard=_shard(shard),
            engine=_engine(engine),
            actors=_actors(actors),
            on_progress=show,
        )
    options.print_facts(_facts(manifest, out), as_json)


def _options(kind: type[BulkOptions], params: Mapping[str, Any]) -> BulkOptions:
    """Return the options of a job from those of the command.

    Raises:
        InvalidInput: one is invalid.
    """
    given = {name: params[name] for name in kind.model_fields if params.get(name) is not None}
    given["keep"] = tuple(filter(None, params["keep"].split(",")))
    ranges = options.read_ranges(params["ranges"])
    given["ranges"] = None if ranges is None else ranges.tolist()
    return validated(kind, given, "the options of bulk")


def _shard(text: str) -> Shard:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InvalidInput(f"--shard is {text}; give i/n with i from 1 to n, such as 2/8.")
    from halimede.bulk import Shard

    return Shard(int(found[1]), int(found[2]))


def _engine(name: str) -> Literal["local", "ray"]:
    if name in ("local", "ray"):
        return cast(Literal["local", "ray"], name)
    raise InvalidInput(f"--engine is {name}; give local or ray.")


def _actors(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise InvalidInput(f"--actors is {text}; give a number, or least and most such as 1-64.")
    return least, most


def _facts(manifest: Manifest, out: str) -> dict[str, Any]:
    files = manifest.files.values()
    return {
        "out": out,
        "model": manifest.model.name,
        "space": manifest.model.space,
        "precision": manifest.model.precision,
        "files": f"{len(files)} of {len(manifest.names())}",
        "rows": sum(file.rows for file in files),
        "errors": sum(file.errors for file in files),
        "truncated": sum(file.truncated for file in files),
        "tokens": sum(file.tokens for file in files),
    }
