"""`halimede bulk` against the engine itself, against Ray, and on clusters of one to four nodes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halimede import Embedder
from halimede.bulk import BulkOptions, run
from halimede_tools.bench import report
from halimede_tools.bench.datasets.sleeping import sleeping
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples.corpus import mixed_texts
from halimede_tools.console import console
from halimede_tools.settings import Settings

PACKAGES = ("onnxruntime-openvino", "pyarrow", "ray")
WORDS = (3, 9)
"""Words of a text, from and to: about 11 tokens."""
OF_ENGINE, OF_LOCAL, OF_LINEAR = 0.95, 0.85, 0.95
MAX_MB = 700
RAY_ROUNDS = 3
NODES = (1, 2, 4)
NODE_TEXTS_PER_S = 2000.0
NODE_ROWS = 60_000
"""Rows for each node of a cluster: 30 s of work."""
NODE_FILE_ROWS = 3000
DIMS = 384
BILLION_FILE_ROWS = 1_000_000
SEED = 22


class Rates(NamedTuple):
    """Rows a second of each round."""

    engine: list[float]
    local: list[float]
    whole: list[float]
    """The command over all rows at once."""
    memory_mb: list[float]
    """Memory of the command at each tenth of its rows."""
    before_ray: list[float]
    ray: list[float]


def bench_bulk(settings: Settings, model: str, precision: str, rows: int, rounds: int) -> Path:
    """Measure, print the tables and write the report. Return the report's path."""
    name = served_name(model, precision)
    with tempfile.TemporaryDirectory(dir=settings.home) as place:
        folder = Path(place)
        rates = _measure(settings, name, folder, rows, rounds)
        grown = _grown(folder)
    goals = _goals(rates, grown)
    one, most = grown[NODES[0]], max(rates.memory_mb)
    return report.publish(
        report.FOLDER / "bulk.md",
        "Datasets",
        [
            *report.goals(goals),
            "",
            *report.table(
                ("nodes", "rows/s", "of linear"),
                [(n, f"{r:,.0f}", f"{100 * r / (n * one):.1f} %") for n, r in grown.items()],
            ),
        ],
        report.origin("halimede bench bulk", name, PACKAGES),
        [
            *_on_paper(statistics.median(rates.local)),
            "",
            f"Texts of {WORDS[0]} to {WORDS[1]} words in JSON Lines, with an id. Engine: "
            f"`Embedder.embed` of {rows // rounds:,} texts in process; bulk: the same texts from "
            f"file to file; {rounds} rounds of both by turns, ratio of the medians. The command "
            f"over all {rows:,} rows: {rates.whole[0]:,.0f} rows/s, its start included; memory at "
            f"each tenth {', '.join(f'{mb:.0f}' for mb in rates.memory_mb)} MB, at most {most:.0f}."
            f" Ray: {RAY_ROUNDS} rounds by turns with one actor, its start included.",
            "",
            f"Nodes: processes of Ray on this machine with one actor each, whose provider sleeps "
            f"1/{NODE_TEXTS_PER_S:.0f} s a text as a model would compute, and {NODE_ROWS:,} rows "
            "for each; measured from the first file to the last.",
        ],
    )


def _goals(rates: Rates, grown: dict[int, float]) -> list[report.Goal]:
    engine = statistics.median(rates.local) / statistics.median(rates.engine)
    ray = statistics.median(rates.ray) / statistics.median(rates.before_ray)
    linear = min(rate / (nodes * grown[NODES[0]]) for nodes, rate in grown.items())
    memory = max(rates.memory_mb)
    return [
        _at_least("bulk against the engine", engine, OF_ENGINE),
        report.Goal("memory", f"{memory:.0f} MB", f"below {MAX_MB} MB", memory < MAX_MB),
        _at_least("Ray with one actor against bulk", ray, OF_LOCAL),
        _at_least(f"{NODES[-1]} nodes against one", linear, OF_LINEAR),
    ]


def _on_paper(rate: float) -> list[str]:
    """What a billion rows take, and ten, at a rate of rows a second on this machine."""
    columns = (
        "on paper",
        "hours of this machine",
        "100 of them",
        "float32",
        "int8",
        "binary",
        "files",
    )
    rows = []
    for count in (10**9, 10**10):
        hours = count / rate / 3600
        sizes = [f"{count * width / 1e12:.2f} TB" for width in (4 * DIMS, DIMS, DIMS / 8)]
        files = f"{count / BILLION_FILE_ROWS:,.0f}"
        rows.append((f"{count:,} rows", f"{hours:,.0f}", f"{hours / 100:.1f} h", *sizes, files))
    return [
        *report.table(columns, rows),
        "",
        f"Computed from the rate of bulk above and {DIMS} dims, not measured: the vectors, as they "
        f"lie in Parquet, with `--rows-per-file {BILLION_FILE_ROWS}`.",
    ]


def _at_least(name: str, ratio: float, least: float) -> report.Goal:
    return report.Goal(
        name, f"{100 * ratio:.1f} %", f"at least {100 * least:.0f} %", ratio >= least
    )


def _measure(settings: Settings, name: str, folder: Path, rows: int, rounds: int) -> Rates:
    rates = Rates([], [], [], [], [], [])
    options = {"provider": "onnx", "model_id": name, "path": str(settings.repository)}
    config = {"models": {name: options}}
    parts = [
        _write(folder / f"{i}.jsonl", i * (rows // rounds), rows // rounds) for i in range(rounds)
    ]
    with Embedder(config=config) as embedder:
        embedder.embed(parts[0][1][:2048])
        for number, (path, texts) in enumerate(parts):
            console.print(f"  round {number + 1} of {rounds} …")
            with _timed(len(texts), rates.engine):
                embedder.embed(texts)
            with _timed(len(texts), rates.local):
                run(embedder, [str(path)], str(folder / f"out-{number}"))
    settings_file = folder / "config.yaml"
    settings_file.write_text(json.dumps(config))
    console.print("  the command over all rows …")
    with _timed(rows, rates.whole):
        _command(
            settings_file, [path for path, _ in parts], folder / "whole", rows, rates.memory_mb
        )
    with Embedder(config=config) as embedder:
        for number in range(RAY_ROUNDS):
            console.print(f"  Ray, round {number + 1} of {RAY_ROUNDS} …")
            sources = [str(path) for path, _ in parts[:3]]
            count = 3 * (rows // rounds)
            with _timed(count, rates.before_ray):
                run(embedder, sources, str(folder / f"before-{number}"))
            with _timed(count, rates.ray):
                run(embedder, sources, str(folder / f"ray-{number}"), engine="ray", actors=(1, 1))
    import ray

    ray.shutdown()
    return rates


def _grown(folder: Path) -> dict[int, float]:
    """Rows a second of clusters by their number of nodes."""
    rates = {}
    for nodes in NODES:
        console.print(f"  {nodes} nodes …")
        path, _ = _write(folder / f"nodes-{nodes}.jsonl", 0, nodes * NODE_ROWS)
        out = folder / f"nodes-out-{nodes}"
        with cluster(nodes), sleeping(NODE_TEXTS_PER_S) as embedder:
            run(
                embedder,
                [str(path)],
                str(out),
                BulkOptions(rows_per_file=NODE_FILE_ROWS),
                engine="ray",
                actors=(nodes, nodes),
            )
        # The first files of all nodes end at about the same time: from there on, all work.
        ended_s = sorted(file.stat().st_mtime for file in out.glob("*.parquet"))
        rows = (len(ended_s) - nodes) * NODE_FILE_ROWS
        rates[nodes] = rows / (ended_s[-1] - ended_s[nodes - 1])
    return rates


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """Connect to a Ray cluster of processes on this machine, whose nodes have one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(nodes):
            started.add_node(num_cpus=1)
        ray.init(address=started.address, logging_level=logging.ERROR)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()  # type: ignore[no-untyped-call]


def _command(
    config: Path, sources: Sequence[Path], out: Path, rows: int, memory_mb: list[float]
) -> None:
    """Run the command, and note its memory at each tenth of its rows."""
    command = [sys.executable, "-m", "halimede", "bulk", *map(str, sources)]
    with subprocess.Popen([*command, "--config", str(config), "--out", str(out)]) as process:
        files = rows / 32_768
        while process.poll() is None:
            written = len(list(out.glob("0*.parquet")))
            memory = _resident_mb(process.pid)  # none of a process that has just ended
            if memory and written >= (len(memory_mb) + 1) * files / 10:
                memory_mb.append(memory)
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def _timed(rows: int, rates: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    rates.append(rows / (time.perf_counter() - began))


def _write(path: Path, first: int, count: int) -> tuple[Path, list[str]]:
    """Write rows with texts of the samples' words, and return their texts."""
    words = sorted({word for text in mixed_texts() for word in text.split() if word.isalpha()})
    chance = random.Random(SEED + first)
    texts = [
        f"{' '.join(chance.choices(words, k=chance.randint(*WORDS)))} {first + row}"
        for row in range(count)
    ]
    with path.open("w") as file:
        for row, text in enumerate(texts):
            file.write(json.dumps({"id": first + row, "text": text}) + "\n")
    return path, texts
