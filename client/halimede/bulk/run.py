"""Run a job: here, or on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from halimede.bulk.job import ALONE, Job, Missing, Shard, open_job
from halimede.bulk.local import files_here
from halimede.bulk.manifest import BulkOptions, FileRecord, Manifest, ModelRecord
from halimede.bulk.plan import with_defaults
from halimede.bulk.storage import EXTRA
from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede.inputs.content import InputKind
from halimede.pipeline.waiting import drive
from halimede_ops.errors import InvalidInput

SAVE_EVERY = 16
"""Files after which the manifest is written again. Each file carries its own record too."""


class Done(NamedTuple):
    """How far this process is."""

    rows: int
    """Rows of the sources that are done, those of earlier runs included."""
    total: int
    """Rows of the sources that this process does."""


def run(
    embedder: Embedder,
    sources: Sequence[str],
    out: str,
    options: BulkOptions | None = None,
    *,
    dedupe: bool = False,
    shard: Shard = ALONE,
    engine: Literal["local", "ray"] = "local",
    actors: tuple[int, int] | None = None,
    on_progress: Callable[[Done], None] = lambda done: None,
) -> Manifest:
    """Embed the rows of files into Parquet files of the folder `out`, and return its manifest.

    What the folder has already is not done again.

    Args:
        embedder: embeds the rows. Its model, space and precision are those of the job.
        sources: paths, folders, patterns or fsspec URLs of Parquet, JSON Lines, CSV, TSV and
            plain text.
        out: path or fsspec URL of a folder.
        options: what is read and written.
        dedupe: embed equal texts once; on a Ray cluster, once in each actor.
        shard: do only this share of the files.
        engine: `local` embeds in this process, `ray` in actors of a Ray cluster.
        actors: least and most actors of Ray. Default: from one to as many as the nodes of the
            cluster have room for.
        on_progress: called as rows are done.

    Raises:
        SpaceRefused: `out` has vectors of another space or precision, or the model changed.
        InvalidInput: an option, a source or `out` cannot be used; or a row, with `errors="raise"`.
        ServerError: the server was not reachable for ten minutes.
    """
    options = with_defaults(BulkOptions() if options is None else options)
    if dedupe and (options.image_column is not None or options.late):
        raise InvalidInput("--dedupe is for texts; give it without --image-column and --late.")
    job = open_job(sources, out, options, model_of(embedder, options), shard)
    with _only_process(job):
        missing = job.missing()
        job.remove_unfinished(missing)
        on_rows = _counted(job, missing, on_progress)
        if engine == "ray":
            from halimede.bulk import cluster

            written = cluster.write_files(job, missing, embedder, actors, dedupe, on_rows)
        else:
            written = files_here(job, missing, embedder, dedupe, on_rows)
        _record(job, written)
    return job.manifest


def _counted(
    job: Job, missing: Sequence[Missing], on_progress: Callable[[Done], None]
) -> Callable[[int], None]:
    """Report how far the job is, and return what adds rows to that."""
    total = sum(part.rows for _, _, part in job.own())
    done = total - sum(one.part.rows for one in missing)
    on_progress(Done(done, total))

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        on_progress(Done(done, total))

    return on_rows


def _record(job: Job, written: Generator[FileRecord]) -> None:
    """Write files, and note each in the manifest."""
    try:
        with contextlib.closing(written):
            for number, record in enumerate(written, start=1):
                job.manifest.files[record.name] = record
                if number % SAVE_EVERY == 0:
                    job.save()
    finally:
        job.save()


def model_of(embedder: Embedder, options: BulkOptions) -> ModelRecord:
    """Return the model that embeds the rows of a job.

    Raises:
        HalimedeError: it cannot be reached, or embeds no such rows.
    """
    kind: InputKind = "text"
    if options.image_column is not None:
        kind = "image" if options.text_column is None else "pair"
    model = drive(embedder._pipeline.describe(kind))
    return ModelRecord(
        name=model.name,
        provider=model.provider,
        space=model.space,
        precision=model.precision,
        dims=options.dimensions or embedder.config.chain()[0].dimensions or model.dims,
        max_tokens=model.max_tokens,
        version=model.version,
        arithmetic=model.arithmetic,
    )


@contextlib.contextmanager
def _only_process(job: Job) -> Iterator[None]:
    """Let no other process of this machine do the same files at the same time.

    Raises:
        InvalidInput: one does.
    """
    if not job.folder.is_local:
        yield
        return
    filelock = import_optional("filelock", EXTRA)
    path = Path(job.folder.path) / f".{job.shard.number}-of-{job.shard.of}.lock"
    try:
        with filelock.FileLock(path, timeout=0):
            yield
    except filelock.Timeout:
        raise InvalidInput("--out is used by another process. Wait for its end.") from None
