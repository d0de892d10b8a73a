"""Runs the missing parts of a job in this process: read, embed, write, all at the same time."""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from halimede.bulk.dedupe import Deduplicated, Deduplication
from halimede.bulk.embedding import WindowEmbedder
from halimede.bulk.job import Job, Missing, Reader, Writer
from halimede.bulk.manifest import FileRecord
from halimede.bulk.windows import Vectors, Window
from halimede.embedder import Embedder
from halimede.pipeline.pool import Pool

IN_FLIGHT = 2
"""Windows that each server of the model has at once, beside the one that is written."""


class _Sent(NamedTuple):
    """A window that is embedded."""

    missing: Missing
    window: Window
    is_last: bool
    """Whether it is the last one of its file."""
    vectors: Future[Vectors] | Deduplicated


def write_files(
    job: Job,
    missing: Sequence[Missing],
    embedder: Embedder,
    *,
    deduplication: Deduplication | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Generator[FileRecord]:
    """Write the missing files in their order, and iterate over their records.

    `on_rows` gets the number of rows of the source that are done. Windows of the next file are
    embedded while one is finished.
    """
    windows = WindowEmbedder(embedder, job.manifest.options, job.manifest.model)
    in_flight = IN_FLIGHT * servers(embedder)
    pool, writer = Pool(in_flight + 1, "bulk"), None
    sent: deque[_Sent] = deque()
    with contextlib.closing(Reader(job, embedder)) as reader, contextlib.closing(pool):
        try:
            for one, window, is_last in _ordered(reader, missing):
                vectors: Future[Vectors] | Deduplicated
                if deduplication is None:
                    vectors = pool.submit(windows.embed, window)
                else:
                    vectors = deduplication.start(window, lambda w: pool.submit(windows.embed, w))
                sent.append(_Sent(one, window, is_last, vectors))
                while len(sent) > in_flight:
                    writer, record = _write(job, writer, sent.popleft(), on_rows)
                    if record is not None:
                        yield record
            while sent:
                writer, record = _write(job, writer, sent.popleft(), on_rows)
                if record is not None:
                    yield record
        finally:
            for left in sent:
                left.vectors.cancel()
            if writer is not None:
                writer.discard()


def files_here(
    job: Job,
    missing: Sequence[Missing],
    embedder: Embedder,
    dedupe: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Generator[FileRecord]:
    """As `write_files`; with `dedupe`, equal texts of the files are embedded once."""
    if not dedupe:
        yield from write_files(job, missing, embedder, on_rows=on_rows)
        return
    with contextlib.ExitStack() as held:
        folder = Path(job.folder.path)
        if not job.folder.is_local:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="halimede-")))
        path = folder / f"_texts-{job.shard.number}-of-{job.shard.of}.sqlite"
        texts = held.enter_context(contextlib.closing(Deduplication(path)))
        yield from write_files(job, missing, embedder, deduplication=texts, on_rows=on_rows)
        texts.delete()


def servers(embedder: Embedder) -> int:
    """Return how many servers answer an embedder's model."""
    urls = getattr(embedder.config.chain()[0], "url", None)
    return len(urls) if isinstance(urls, (list, tuple)) else 1


def _ordered(reader: Reader, missing: Sequence[Missing]) -> Iterator[tuple[Missing, Window, bool]]:
    """Iterate over the windows of files, and say which is a file's last."""
    for one in missing:
        before: Window | None = None
        for window in reader.windows(one):
            if before is not None:
                yield one, before, False
            before = window
        if before is not None:
            yield one, before, True


def _write(
    job: Job, writer: Writer | None, sent: _Sent, on_rows: Callable[[int], None]
) -> tuple[Writer | None, FileRecord | None]:
    """Write a window, and finish its file if it is the last one."""
    done = sent.vectors.result()
    if writer is None:
        writer = Writer(job, sent.missing)
    try:
        writer.write(sent.window, done)
        on_rows(len(set(sent.window.rows)))
        return (None, writer.finish()) if sent.is_last else (writer, None)
    except BaseException:
        writer.discard()
        raise
