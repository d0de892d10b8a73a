"""Writes the missing files of a job in actors of a Ray cluster, through Ray Data.

What travels is small: the parts that are missing go out, and the records of their files come back.
An actor reads its part of the source and writes its file itself. So a file that is written twice,
because Ray repeats what a lost node did, is the same file, and every row is there once.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halimede.bulk.dedupe import Deduplication
from halimede.bulk.job import Job, Missing
from halimede.bulk.local import servers
from halimede.bulk.local import write_files as write_files_here
from halimede.bulk.manifest import FileRecord, read_record
from halimede.bulk.rows import COMPRESSED, Part
from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede_ops import errors
from halimede_ops.errors import InvalidInput

EXTRA = "bulk-ray"
MOST_THREADS = 16
"""Threads of one actor: a small model gains little from more, and a node has room for several."""
FILES_AT_ONCE = 4
"""Most files of one call of an actor: between two calls it computes nothing."""
CALLS = 8
"""Least calls of each actor, where there are enough files: the last ones end together."""
IN_PROCESS = ("onnx", "sentence-transformers")
"""Providers that compute in the actor."""


class Actors(NamedTuple):
    """The actors of a job."""

    least: int
    most: int
    cpus: int
    """CPUs that Ray keeps for each, and threads of its engine."""
    gpus: float
    """GPUs that Ray keeps for each."""


def write_files(
    job: Job,
    missing: Sequence[Missing],
    embedder: Embedder,
    actors: tuple[int, int] | None,
    dedupe: bool,
    on_rows: Callable[[int], None],
) -> Generator[FileRecord]:
    """Write the missing files, and iterate over their records in the order in which they end.

    Connects to the cluster of `RAY_ADDRESS`, else to one on this machine, else starts one here.

    Raises:
        InvalidInput: the cluster has no room for the actors.
    """
    ray = import_optional("ray", EXTRA)
    data = import_optional("ray.data", EXTRA)
    if not missing:
        return
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    plan = planned(embedder, actors, [node for node in ray.nodes() if node["Alive"]])
    data.DataContext.get_current().enable_progress_bars = False
    groups = _groups(job, missing)
    at_once = max(1, min(FILES_AT_ONCE, len(groups) // (CALLS * plan.most)))
    items = data.from_items(
        [{"files": json.dumps(group)} for group in groups],
        override_num_blocks=math.ceil(len(groups) / at_once),
    )
    written = items.map_batches(
        Actor,
        fn_constructor_args=(job.without_files(), with_threads(embedder, plan.cpus), dedupe),
        batch_size=at_once,
        compute=data.ActorPoolStrategy(min_size=plan.least, max_size=plan.most),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )
    try:
        for row in written.iter_rows():
            done = json.loads(row["written"])
            if "error" in done:
                raise getattr(errors, done["error"])(done["message"])
            for one in done["records"]:
                record = FileRecord.model_validate(one)
                on_rows(record.source_rows)
                yield record
    except ray.exceptions.RayError as error:
        raise errors.ServerError(f"Ray ended the job ({type(error).__name__}).") from error


class Actor:
    """Writes files with an engine of its own."""

    def __init__(self, job: Job, embedder: Embedder, dedupe: bool) -> None:
        self._job = job
        self._embedder = embedder
        self._texts: Deduplication | None = None
        if dedupe:
            self._folder = tempfile.TemporaryDirectory(prefix="halimede-")
            self._texts = Deduplication(Path(self._folder.name) / "texts.sqlite")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Write files, and return their records.

        An error of ours is returned: raised, it would reach the driver as text within Ray's own.
        """
        files = [file for text in batch["files"] for file in json.loads(text)]
        try:
            written: dict[str, Any] = {"records": self._write(files)}
        except errors.HalimedeError as error:
            written = {"error": type(error).__name__, "message": str(error)}
        return {"written": [json.dumps(written)]}

    def _write(self, files: Sequence[Any]) -> list[dict[str, Any]]:
        """Write files, but those that a lost actor has written already."""
        folder = self._job.folder
        records, missing = [], []
        for name, source, part in files:
            record = read_record(folder.child(name))
            if record is None:
                missing.append(Missing(name, source, Part(*part)))
            else:
                records.append(record)
        records += write_files_here(self._job, missing, self._embedder, deduplication=self._texts)
        return [record.model_dump() for record in records]


def planned(embedder: Embedder, asked: tuple[int, int] | None, nodes: Sequence[Any]) -> Actors:
    """Return the actors for these nodes of a cluster.

    A model in the actors' own process gets the GPUs if there are any, else all CPUs: at most
    MOST_THREADS for each actor. A client of servers needs one CPU.

    Raises:
        InvalidInput: the nodes have no room for as many as are asked for.
    """
    resources = [node["Resources"] for node in nodes]
    cpus = [int(one.get("CPU", 0)) for one in resources]
    gpus = [int(one.get("GPU", 0)) for one in resources]
    if embedder.config.chain()[0].provider not in IN_PROCESS:
        each, gpu = 1, 0.0
        fit = min(sum(cpus), 2 * servers(embedder) * max(1, len(nodes)))
    elif any(gpus):
        gpu = 1.0
        each = max(1, min(c // g for c, g in zip(cpus, gpus, strict=True) if g))
        fit = sum(min(g, c // each) for c, g in zip(cpus, gpus, strict=True))
    else:
        gpu = 0.0
        most = max(cpus, default=0)
        each = max(1, math.ceil(most / math.ceil(most / MOST_THREADS))) if most else 1
        fit = sum(c // each for c in cpus)
    room = sum(c // each for c in cpus) if not gpu else fit
    least, most_actors = asked or (1, max(1, fit))
    if least > room:
        raise InvalidInput(
            f"{least} actors of {each} CPUs{' and a GPU' if gpu else ''} are asked for, and the "
            f"cluster has room for {room} ({sum(cpus)} CPUs on {len(nodes)} nodes). Give fewer "
            "--actors, or start more nodes."
        )
    return Actors(least, max(least, most_actors), each, gpu)


def with_threads(embedder: Embedder, threads: int) -> Embedder:
    """Return an embedder whose models in the process use so many threads.

    Ray tells an actor nothing of its share of the node's cores but OMP_NUM_THREADS.
    """
    config = embedder.config
    models = {
        name: options.model_copy(update={"threads": threads})
        if options.provider == "onnx" and getattr(options, "threads", 0) is None
        else options
        for name, options in config.models.items()
    }
    return Embedder(
        config=config.model_copy(update={"models": models}), providers=embedder._providers
    )


def _groups(job: Job, missing: Sequence[Missing]) -> list[list[Missing]]:
    """Return the files that one call of an actor writes.

    A compressed source of lines is read from its begin: its files are written one after another.
    """
    groups: dict[Any, list[Missing]] = {}
    for one in missing:
        is_compressed = job.manifest.sources[one.source].url.endswith(COMPRESSED)
        groups.setdefault(one.source if is_compressed else one.name, []).append(one)
    return list(groups.values())
