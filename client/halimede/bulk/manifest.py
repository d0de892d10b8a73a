"""The record of a job: its input, its model, and the files that are written.

`_manifest.json` in the folder of the output; `_manifest-2-of-8.json` of the second of eight
processes. A file's own record is also in its Parquet metadata, under the key `halimede`: what a
killed job wrote after its manifest is not lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from halimede.bulk.rows import Part
from halimede.bulk.storage import EXTRA, Place
from halimede.extras import import_optional
from halimede_ops.errors import HalimedeError, InvalidInput, SpaceRefused
from halimede_ops.quantise import OutputType

FORMAT = 1
PREFIX, SUFFIX = "_manifest", ".json"
METADATA = "halimede"
"""Key of a file's record in its Parquet metadata."""
ROWS = 32_768
"""Rows of the source in one file of the output: at most so much is done again after a kill."""


class BulkOptions(BaseModel):
    """What a job reads, and what it writes of each row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_column: str | None = None
    """Column with the texts. Default: `text`, unless there is an image column."""
    image_column: str | None = None
    """Column with images: bytes, paths or URLs. With a text column too, the pair is embedded."""
    id_column: str | None = None
    """Column that identifies a row. Default: the columns `source` and `row` are written."""
    keep: tuple[str, ...] = ()
    """Further columns of the source to write. `*` is all of them."""
    input_type: str | None = None
    dimensions: PositiveInt | None = None
    output_type: OutputType = "float32"
    ranges: tuple[tuple[float, ...], ...] | None = None
    """For int8 and uint8: lowest and highest value of each dimension."""
    errors: Literal["raise", "collect"] = "raise"
    """`collect` writes a null vector and an error for a row that cannot be embedded."""
    chunk_tokens: PositiveInt | None = None
    """Tokens of a chunk: a vector for each chunk of a text. Default: a vector for each text."""
    chunk_overlap: NonNegativeInt = 0
    """Tokens that neighbouring chunks share."""
    late: bool = False
    """Whether chunks are pooled from one pass over their whole text."""
    rows_per_file: PositiveInt = ROWS
    """Rows of the source in one file of the output."""


class ModelRecord(BaseModel):
    """The model of a job. Vectors of another space or precision are not written beside its own."""

    name: str
    provider: str
    space: str
    precision: str
    dims: int
    """Components of each vector."""
    max_tokens: int
    version: str
    """Version when the job began. `files` has those that answered."""
    arithmetic: str
    """Arithmetic that the model computes in, such as bf16. Empty if the provider does not tell."""


class SourceRecord(BaseModel):
    """A file of the input."""

    url: str
    size_bytes: int
    changed: str
    """What changes with its content: a time or a tag of the storage. Empty if it tells none."""
    rows: int
    parts: list[Part]


class FileRecord(BaseModel):
    """A file of the output: one part of a source."""

    name: str
    source: int
    """Place in `sources`."""
    first_row: int
    source_rows: int
    rows: int
    """Rows written: more than `source_rows` where texts are chunked."""
    errors: int
    truncated: int
    tokens: int
    versions: list[int]
    """Versions of the model that answered."""
    size_bytes: int = 0


class Manifest(BaseModel):
    """The record of a job."""

    format: int = FORMAT
    options: BulkOptions
    model: ModelRecord
    arrow_schema: str
    """Types of the columns that are copied, in Arrow's own format, base64."""
    sources: list[SourceRecord]
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """Files that are written, by name."""

    def names(self) -> dict[str, tuple[int, Part]]:
        """Return each file of the whole job: its source and its part."""
        return {
            f"{source:05d}-{number:06d}.parquet": (source, part)
            for source, record in enumerate(self.sources)
            for number, part in enumerate(record.parts)
        }

    def check_same(self, other: Manifest) -> None:
        """Check that another job may write into the folder of this one.

        Raises:
            SpaceRefused: its vectors have another space, precision or length.
            InvalidInput: it reads or writes something else.
        """
        for name in ("space", "precision", "dims"):
            ours, theirs = getattr(self.model, name), getattr(other.model, name)
            if ours != theirs:
                raise SpaceRefused(
                    f"--out has vectors of {name} {ours} ({self.model.name}); {other.model.name} "
                    f"has {name} {theirs}. Give another --out."
                )
        for name in type(self.options).model_fields:
            ours, theirs = getattr(self.options, name), getattr(other.options, name)
            if ours != theirs:
                raise InvalidInput(
                    f"--out has a job with {name} {ours}; {theirs} is given. Give another --out."
                )
        self.check_sources(other.sources)

    def check_sources(self, others: Iterable[SourceRecord]) -> None:
        """Check that the sources are those of this job, as they were.

        Raises:
            InvalidInput: they are not.
        """
        identities = [
            [(s.url, s.size_bytes, s.changed) for s in many] for many in (self.sources, others)
        ]
        if identities[0] != identities[1]:
            changed = [url for url, *_ in identities[1] if url in {u for u, *_ in identities[0]}]
            raise InvalidInput(
                "--out has a job of other sources, or a source has changed since. Give another "
                f"--out, or the same sources in the same order ({len(self.sources)} files; "
                f"{len(identities[1])} are given, {len(changed)} of them known)."
            )


def manifest_name(shard: int, shards: int) -> str:
    """Return the name of the manifest of one of several processes, counted from 1."""
    return f"{PREFIX}{SUFFIX}" if shards == 1 else f"{PREFIX}-{shard}-of-{shards}{SUFFIX}"


def read_manifest(folder: Place) -> Manifest | None:
    """Return the manifest of a folder, with what all its processes have written.

    None: there is none.

    Raises:
        InvalidInput: a manifest is damaged, or two are of different jobs.
    """
    together: Manifest | None = None
    for name in folder.sizes():
        if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            continue
        place = folder.child(name)
        try:
            manifest = Manifest.model_validate_json(place.files.cat_file(place.path))
        except ValueError:
            raise InvalidInput(f"{place.url} is not a manifest of halimede {FORMAT}.") from None
        if together is None:
            together = manifest
        else:
            together.check_same(manifest)
            together.files.update(manifest.files)
    return together


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Write a manifest in one step."""
    with place.replaced() as file:
        file.write(manifest.model_dump_json().encode())


def file_metadata(manifest: Manifest, record: FileRecord) -> dict[str, str]:
    """Return the Parquet metadata of a file: it says which space its vectors have."""
    facts: Mapping[str, Any] = {
        "format": FORMAT,
        **manifest.model.model_dump(),
        "output_type": manifest.options.output_type,
        "file": record.model_dump(exclude={"size_bytes"}),
    }
    return {METADATA: json.dumps(facts)}


def read_record(place: Place) -> FileRecord | None:
    """Return the record in a file's own metadata. None: it is no file of a job."""
    parquet = import_optional("pyarrow.parquet", EXTRA)
    pyarrow = import_optional("pyarrow", EXTRA)
    try:
        with place.files.open(place.path, "rb") as file:
            metadata = parquet.read_metadata(file).metadata or {}
        record = FileRecord.model_validate(json.loads(metadata[METADATA.encode()])["file"])
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, HalimedeError):
        return None
    return record.model_copy(update={"size_bytes": place.files.size(place.path)})
