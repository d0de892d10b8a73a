"""Bulk jobs on a Ray cluster: processes of Ray on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from halimede import Embedder, InvalidInput
from halimede.bulk import BulkOptions, Done, run
from halimede.bulk.cluster import Actors, planned
from halimede_tools.bench.datasets.bulk import cluster
from halimede_tools.bench.datasets.sleeping import sleeping

HASH = {"models": {"hashed": {"provider": "hash", "model_id": "hashed"}}}
ROWS = 6000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "a.jsonl"
    rows = [{"id": i, "text": f"text {i}" if i != 4321 else None} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    with cluster(2) as nodes:
        yield nodes


@pytest.mark.parametrize("dedupe", [False, True])
def test_a_cluster_writes_what_one_machine_writes(
    two_nodes: Any, source: Path, tmp_path: Path, dedupe: bool
) -> None:
    """The same files, rows and errors, and the same manifest but for the order."""
    options = BulkOptions(rows_per_file=700, id_column="id", errors="collect")
    with Embedder(config=HASH) as embedder:
        local = run(embedder, [str(source)], str(tmp_path / "local"), options)
        seen: list[Done] = []
        there = run(
            embedder, [str(source)], str(tmp_path / "ray"), options, engine="ray",
            dedupe=dedupe,
            on_progress=seen.append,
        )  # fmt: skip
    assert pq.read_table(tmp_path / "ray").equals(pq.read_table(tmp_path / "local"))
    assert there.files == local.files
    assert seen[-1] == Done(ROWS, ROWS)


def test_an_error_of_an_actor_is_ours(two_nodes: Any, source: Path, tmp_path: Path) -> None:
    """A row without a text ends the job with the same error as on one machine, and not with Ray's."""
    with (
        Embedder(config=HASH) as embedder,
        pytest.raises(InvalidInput, match="row 4321 has nothing to embed"),
    ):
        run(embedder, [str(source)], str(tmp_path / "out"), engine="ray")


def test_actors_that_nothing_has_room_for_are_refused(
    two_nodes: Any, source: Path, tmp_path: Path
) -> None:
    """An error at once says how many fit, and nothing waits for CPUs that do not come."""
    with (
        Embedder(config=HASH) as embedder,
        pytest.raises(InvalidInput, match=r"64 actors of 1 CPUs .* has room for 2 \(2 CPUs on 3"),
    ):
        run(embedder, [str(source)], str(tmp_path / "out"), engine="ray", actors=(64, 64))


@pytest.mark.parametrize(
    ("provider", "nodes", "asked", "expected"),
    [
        ("onnx", [{"CPU": 8}], None, Actors(1, 1, 8, 0)),
        ("onnx", [{"CPU": 64}, {"CPU": 64}], None, Actors(1, 8, 16, 0)),
        ("onnx", [{"CPU": 48}], (2, 2), Actors(2, 2, 16, 0)),
        ("onnx", [{}, {"CPU": 2}, {"CPU": 2}], None, Actors(1, 2, 2, 0)),
        ("onnx", [{"CPU": 32, "GPU": 4}, {"CPU": 8}], None, Actors(1, 4, 8, 1)),
        ("triton", [{"CPU": 16}], None, Actors(1, 2, 1, 0)),
        ("triton", [{"CPU": 4}], (3, 9), Actors(3, 9, 1, 0)),
    ],
)
def test_actors_follow_from_the_nodes(
    provider: str, nodes: list[dict[str, float]], asked: tuple[int, int] | None, expected: Actors
) -> None:
    """A model gets a node's GPUs, or its CPUs in shares of at most 16; a client gets one CPU."""
    config = {"models": {"m": {"provider": provider, "model_id": "m"}}}
    with Embedder(config=config) as embedder:
        assert planned(embedder, asked, [{"Resources": node} for node in nodes]) == expected


def test_actors_and_nodes_that_are_killed(two_nodes: Any, source: Path, tmp_path: Path) -> None:
    """Ten actors are killed, and a node leaves and another joins: every id is there once."""
    options = BulkOptions(rows_per_file=100, id_column="id", errors="collect")
    killed = 0
    with sleeping(1200) as embedder, ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            run, embedder, [str(source)], str(tmp_path / "out"), options, engine="ray",
            actors=(1, 2),
        )  # fmt: skip
        while not job.done() and killed < 10:
            time.sleep(0.5)
            actors = actor_processes()
            if actors:
                actors[killed % len(actors)].kill()
                killed += 1
            if actors and killed == 5:
                two_nodes.remove_node(two_nodes.list_all_nodes()[-1], allow_graceful=False)
                two_nodes.add_node(num_cpus=1)
        manifest = job.result(120)
    assert killed == 10
    assert pq.read_table(tmp_path / "out").column("id").to_pylist() == list(range(ROWS))
    assert sum(file.rows for file in manifest.files.values()) == ROWS


def actor_processes() -> list[psutil.Process]:
    """The actors of Ray Data on this machine, by the title that Ray gives their processes."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "MapWorker" in " ".join(process.info["cmdline"] or ())
    ]
