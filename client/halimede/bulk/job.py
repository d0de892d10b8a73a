"""A job: its manifest, the parts that are missing, and how one is read and written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from halimede.bulk import manifest as manifests
from halimede.bulk import plan as plans
from halimede.bulk import windows
from halimede.bulk.embedding import value_type, width_of
from halimede.bulk.manifest import BulkOptions, FileRecord, Manifest, ModelRecord, SourceRecord
from halimede.bulk.rows import SUFFIXES, Part, Rows, open_rows
from halimede.bulk.storage import EXTRA, Place, expand, place
from halimede.bulk.windows import Vectors, Window
from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede_ops.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

COMPRESSION = "zstd"


class Shard(NamedTuple):
    """One of several processes that share a job, counted from 1."""

    number: int
    of: int


ALONE = Shard(1, 1)


class Missing(NamedTuple):
    """A file that is not written yet."""

    name: str
    source: int
    part: Part


@dataclasses.dataclass
class Job:
    """What a process of a job needs to know. It can be pickled."""

    out: str
    manifest: Manifest
    shard: Shard = ALONE

    @property
    def folder(self) -> Place:
        """The folder of the output."""
        return place(self.out)

    @property
    def copied(self) -> pa.Schema:
        """Types of the columns that are copied."""
        return plans.schema_of(self.manifest.arrow_schema)

    @property
    def schema(self) -> pa.Schema:
        """The columns of the output."""
        options, model = self.manifest.options, self.manifest.model
        return windows.output_schema(
            self.copied,
            has_id=options.id_column is not None,
            is_chunked=options.chunk_tokens is not None,
            collects=options.errors == "collect",
            value_type=value_type(options.output_type),
            width=width_of(model.dims, options.output_type),
        )

    def without_files(self) -> Job:
        """Return what an actor needs of the job: not the files of all others."""
        sources = [s.model_copy(update={"parts": []}) for s in self.manifest.sources]
        manifest = self.manifest.model_copy(update={"files": {}, "sources": sources})
        return dataclasses.replace(self, manifest=manifest)

    def own(self) -> list[Missing]:
        """Return the files of this process, in the order of the sources."""
        names = self.manifest.names()
        return [
            Missing(name, *where)
            for number, (name, where) in enumerate(names.items())
            if number % self.shard.of == self.shard.number - 1
        ]

    def missing(self) -> list[Missing]:
        """Return the files of this process that are not written, in the order of the sources."""
        return [one for one in self.own() if one.name not in self.manifest.files]

    def remove_unfinished(self, missing: Sequence[Missing]) -> None:
        """Remove what a killed process has left of these files."""
        names = {one.name for one in missing}
        folder = self.folder
        for name in folder.sizes():
            if name.startswith(".") and name[1:].rpartition(".")[0] in names:
                left = folder.child(name)
                left.files.rm(left.path)

    def save(self) -> None:
        """Write the manifest of this process."""
        name = manifests.manifest_name(*self.shard)
        manifests.write_manifest(self.folder.child(name), self.manifest)


def open_job(
    sources: Sequence[str], out: str, options: BulkOptions, model: ModelRecord, shard: Shard
) -> Job:
    """Begin a job, or go on with that of the folder `out`.

    Raises:
        SpaceRefused: `out` has vectors of another space, precision or length.
        InvalidInput: `out` has another job or other files, or a source cannot be used.
    """
    folder = place(out)
    options = plans.with_defaults(options)
    places = expand(sources, SUFFIXES)
    if not places:
        raise InvalidInput("no SOURCE is given; give files, folders or URLs.")
    known = manifests.read_manifest(folder)
    if known is None:
        if any(name.endswith(".parquet") for name in folder.sizes()):
            raise InvalidInput("--out has files of no job. Give an empty or a new folder.")
        records, schema = plans.plan(places, options)
        known = Manifest(
            options=options,
            model=model,
            arrow_schema=plans.schema_text(schema),
            sources=records,
        )
        folder.files.makedirs(folder.path, exist_ok=True)
    else:
        given = known.model_copy(update={"options": options, "model": model})
        known.check_same(given)
        known.check_sources(
            [SourceRecord(url=one.url, rows=0, parts=[], **one.identity()) for one in places]
        )
    job = Job(folder.url, known, shard)
    known.files = _written(job)
    job.save()
    return job


def _written(job: Job) -> dict[str, FileRecord]:
    """Return the records of the files that are whole."""
    folder, known = job.folder, job.manifest
    sizes = folder.sizes()
    written = {}
    for name in sizes.keys() & known.names().keys():
        record = known.files.get(name)
        if record is None or record.size_bytes != sizes[name]:
            record = manifests.read_record(folder.child(name))
        if record is not None:
            written[name] = record
    return written


class Reader:
    """The windows of missing files, in order."""

    def __init__(self, job: Job, embedder: Embedder) -> None:
        self._job = job
        self._options = job.manifest.options
        self._copied = job.copied
        self._rows: tuple[int, Rows] | None = None
        self._chunk = None
        if self._options.chunk_tokens is not None:
            self._chunk = embedder.chunker(
                self._options.chunk_tokens,
                self._options.chunk_overlap,
                input_type=self._options.input_type,
            )

    def windows(self, missing: Missing) -> Iterator[Window]:
        """Read a part of a source, and cut it into windows."""
        pyarrow = import_optional("pyarrow", EXTRA)
        options, part = self._options, missing.part
        rows = self._open(missing.source)
        text, image = options.text_column, options.image_column
        content = [rows.content(c, is_image=c == image) for c in (text, image) if c is not None]
        names = {field.name for field in content}
        others = [field for field in self._copied if field.name not in names]
        read = rows.read(part, pyarrow.schema([*content, *others]), text)
        columns = [read.table.column(field.name).to_pylist() for field in content]
        if image is not None:
            columns[-1] = [_image(value) for value in columns[-1]]
        values = columns[0] if len(columns) == 1 else [_pair(p) for p in zip(*columns, strict=True)]
        copied = read.table.select(self._copied.names)
        if options.id_column is None:
            copied = windows.located(copied, missing.source, part.first_row)
        most = windows.TEXTS if image is None else windows.IMAGES
        for window in windows.cut(read, values, copied, part.first_row, most):
            yield (
                window
                if self._chunk is None
                else windows.chunked(window, self._chunk, options.late)
            )

    def close(self) -> None:
        """Close the source."""
        if self._rows is not None:
            self._rows[1].close()
            self._rows = None

    def _open(self, source: int) -> Rows:
        if self._rows is None or self._rows[0] != source:
            self.close()
            record = self._job.manifest.sources[source]
            where = place(record.url)
            changed = where.identity()
            if changed != {"size_bytes": record.size_bytes, "changed": record.changed}:
                raise InvalidInput(f"{record.url} has changed since the job began.")
            self._rows = (source, open_rows(where))
        return self._rows[1]


class Writer:
    """A file of the output. It has its name when it is whole."""

    def __init__(self, job: Job, missing: Missing) -> None:
        parquet = import_optional("pyarrow.parquet", EXTRA)
        self._job = job
        self._missing = missing
        self._schema = job.schema
        self._place = job.folder.child(missing.name)
        self._open = contextlib.ExitStack()
        file = self._open.enter_context(self._place.replaced())
        coded = [name for name in self._schema.names if name != plans.VECTOR]
        self._parquet = parquet.ParquetWriter(
            file,
            self._schema,
            use_dictionary=coded,
            compression=dict.fromkeys(coded, COMPRESSION),
        )
        self._counts = {"rows": 0, "errors": 0, "truncated": 0, "tokens": 0}
        self._versions: set[int] = set()

    def write(self, window: Window, done: Vectors) -> None:
        """Write a window."""
        self._parquet.write_table(windows.table_of(window, done, self._schema))
        counted = {
            "rows": len(window.values),
            "errors": len(done.errors),
            "truncated": int(done.truncated.sum()),
            "tokens": int(done.tokens.clip(0).sum()),
        }
        self._counts = {name: value + counted[name] for name, value in self._counts.items()}
        self._versions |= done.versions - {0}

    def finish(self) -> FileRecord:
        """Write the end of the file, give it its name, and return its record."""
        source, part = self._missing.source, self._missing.part
        record = FileRecord(
            name=self._missing.name,
            source=source,
            first_row=part.first_row,
            source_rows=part.rows,
            versions=sorted(self._versions),
            **self._counts,
        )
        metadata = manifests.file_metadata(self._job.manifest, record)
        self._parquet.add_key_value_metadata(metadata)
        self._parquet.close()
        self._open.close()
        size_bytes = self._place.files.size(self._place.path)
        return record.model_copy(update={"size_bytes": size_bytes})

    def discard(self) -> None:
        """Remove what is written, if the file is not finished."""
        with contextlib.suppress(Discarded), self._open:
            self._parquet.close()  # else the garbage collector does, into a closed file
            raise Discarded


class Discarded(Exception):
    """A file is not finished."""


def _image(value: Any) -> Any:
    """Return the image of a cell; Hugging Face's datasets have its bytes or path in a struct."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def _pair(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return None if all(value is None for value in values) else values
