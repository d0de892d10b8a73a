"""Every engine on one machine, in one run, with the same weights and the same texts.

Each engine is a process of its own that stays up. In every case the engines are measured in turn,
so that all see the machine in the same state. Each figure is written to the results file at once,
so a run can be split by cases and its report written at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

import halimede_tools
from halimede_ops import vectors
from halimede_ops.errors import DownloadError, HalimedeError
from halimede_tools.bench.peers import engines, limit, tables
from halimede_tools.bench.peers.engines import REFERENCE, Engine
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

PRECISIONS = ("fp32", "fp16", "int8")
STRIDE = 5
"""One in so many of the mixed texts, by length, is sent alone."""
LONG_TEXTS = 32
BULK_TEXTS = 1000
BULK_LEAD_S = 0.5
"""Time for bulk to fill the server before single texts are sent beside it."""
COMPARED = 100
"""Texts whose vectors are compared."""
ALONE = 20
"""How many of these are embedded alone as well."""
FIRST_PORT = 18_100
"""Each server has three ports from here on, ten apart."""


Figures = dict[str, Any]
"""One line of the results file: a name each, and what JSON can hold."""


class Case(NamedTuple):
    """One thing that is measured."""

    name: str
    way: str
    """`together`: one call. `each`: a call a text. `beside`: the same while another client sends
    bulk; only of served engines."""
    texts: str
    """Of `texts`."""
    size: int
    concurrency: int = 1


def texts() -> dict[str, list[str]]:
    """The texts by kind: `mixed`; `single`, a share of the mixed with the same lengths, to send one
    by one; `long`, of more than 256 tokens.
    """
    mixed = corpus.mixed_texts()
    single = sorted(mixed, key=len)[::STRIDE]
    random.Random(1).shuffle(single)
    chance = random.Random(2)
    long = [" ".join(chance.choices(corpus.SENTENCES, k=40)) for _ in range(LONG_TEXTS)]
    return {"mixed": mixed, "single": single, "long": long}


BESIDE = "beside bulk"
SINGLES = len(texts()["single"])
CASES = (
    Case("single", "each", "single", SINGLES),
    Case("100", "together", "mixed", 100),
    Case("1000", "together", "mixed", 1000),
    Case("long", "together", "long", LONG_TEXTS),
    Case("singles", "together", "single", SINGLES),
    *(Case(f"concurrency {n}", "each", "single", SINGLES, n) for n in (8, 32, 64)),
    Case(BESIDE, "beside", "single", SINGLES),
)


class Process:
    """One engine in a process of its own."""

    def __init__(self, engine: Engine, settings: Settings, model: str, address: str = "") -> None:
        self.engine = engine
        python = engines.python(engine.environment, settings)
        arguments = engines.arguments(engine, settings, model, address)
        self.folder = write_texts(settings)
        self._log = self.folder / f"{engine.name}.log"
        began = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-P", "-m", "halimede_tools.bench.peers.runner", *arguments],
                env=_environment(engine, self.folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.ask("together", "mixed", 1, 1)
        self.cold_start_s = time.perf_counter() - began
        """From the start of Python to the first embedding."""

    def measure(self, case: Case, *arguments: str) -> Figures:
        """The figures of one case."""
        figures = self.ask(case.way, case.texts, case.size, case.concurrency, *arguments)
        latencies = figures.pop("latencies", None)
        if latencies:
            figures["p50_ms"], figures["p99_ms"] = np.percentile(latencies, (50, 99)) * 1000
        return figures

    def ask(self, way: str, kind: str, count: int, *arguments: str | int) -> Figures:
        """What the process answers.

        Raises:
            HalimedeError: it has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        command = {
            "way": way,
            "texts": str(self.folder / f"{kind}.json"),
            "count": count,
            "arguments": arguments,
        }
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise HalimedeError(f"{self.engine.name} ended by itself; see {self._log}")
        answer: Figures = json.loads(line)
        return answer

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors `[texts, dims]` of the first COMPARED texts, and of the first ALONE embedded
        alone.
        """
        file = self.folder / "vectors.npz"
        self.ask("save", "single", COMPARED, ALONE, str(file))
        with np.load(file) as saved:
            return saved["together"], saved["alone"]

    def memory_bytes(self) -> int:
        """Memory of the process and its children, what they share counted once."""
        return memory_bytes(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Served:
    """One model on a Triton of its own, as `halimede serve` starts it, with the process of a client
    and one that sends single texts.
    """

    def __init__(self, engine: Engine, settings: Settings, model: str, port: int) -> None:
        self.engine = engine
        self.name = served_name(model, engine.precision)
        options = wheel.Options(
            http_port=port, grpc_port=port + 1, metrics_port=port + 2, models=(self.name,)
        )
        self._open = contextlib.ExitStack()
        began = time.perf_counter()
        self._server = self._open.enter_context(
            wheel.serve(
                settings.repository, settings.python_backend, settings.run(port + 1), options
            )
        )
        first_embedding(self._server.http_address, self.name)
        self.cold_start_s = time.perf_counter() - began
        """From the start of Triton to the first embedding."""
        self._client = Process(engine, settings, model, self._server.grpc_address)
        self._load = Process(engine, settings, model, self._server.grpc_address)

    def measure(self, case: Case) -> Figures:
        """The figures of one case; `cpu_s` is the client's or the load generator's."""
        if case.way == "together":
            return self._client.measure(case)
        if case.way == "beside":
            return self._beside_bulk(case)
        return self._single(case)

    def _beside_bulk(self, case: Case) -> Figures:
        done = threading.Event()

        def send_bulk() -> list[float]:
            calls_s = []
            while not done.is_set():
                calls_s.append(self._client.ask("together", "mixed", BULK_TEXTS, 1)["seconds"])
            return calls_s

        with ThreadPoolExecutor(1) as sender:
            bulk = sender.submit(send_bulk)
            time.sleep(BULK_LEAD_S)
            figures = self._single(case)
            done.set()
        calls_s = bulk.result()
        return figures | {"bulk_texts_per_s": len(calls_s) * BULK_TEXTS / sum(calls_s)}

    def _single(self, case: Case) -> Figures:
        return self._load.measure(case._replace(way="load"), self._server.grpc_address, self.name)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """As a Process."""
        return self._client.vectors()

    def memory_bytes(self) -> int:
        """Memory of Triton and its Python process, what they share counted once."""
        return memory_bytes(self._server.process.pid)

    def close(self) -> None:
        """End the clients, then the server."""
        self._client.close()
        self._load.close()
        self._open.close()


def first_embedding(http_address: str, model: str) -> None:
    """Raise unless the server embeds a text."""
    tensor = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["hello world"]}
    url = f"http://{http_address}/v2/models/{model}/infer"
    httpx.post(url, json={"inputs": [tensor]}, timeout=60).raise_for_status()


def memory_bytes(pid: int) -> int:
    """Memory of a process and its children, what they share counted once."""
    import psutil  # type: ignore[import-untyped]

    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    return sum(int(process.memory_full_info().pss) for process in family)


def _environment(engine: Engine, folder: Path) -> dict[str, str]:
    """The peers see of our packages only what runs them, and no hub."""
    if not engine.environment:
        return dict(os.environ)
    link = folder / "packages" / halimede_tools.__name__
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(halimede_tools.__file__).parent)
    return {
        **os.environ,
        "PYTHONPATH": str(link.parent),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def write_texts(settings: Settings) -> Path:
    """The folder with a file of each kind of texts."""
    folder = settings.home / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, listed in texts().items():
        (folder / f"{kind}.json").write_text(json.dumps(listed))
    return folder


def select(precisions: Sequence[str], named: Sequence[str] = ()) -> list[Engine]:
    """The engines of these precisions whose names contain one of `named`, if any are; the reference
    always.
    """
    ours = [engine for precision in PRECISIONS for engine in engines.ours(precision)]
    return [
        engine
        for engine in (*engines.PEERS, *ours)
        if engine is REFERENCE
        or (
            engine.precision in precisions
            and (not named or any(part in engine.name for part in named))
        )
    ]


@contextlib.contextmanager
def started(
    settings: Settings, model: str, wanted: Sequence[Engine], first_port: int = FIRST_PORT
) -> Iterator[list[Process | Served]]:
    """Start all engines, one after the other, and end them with the block. An engine whose
    environment cannot be made is left out.
    """
    running: list[Process | Served] = []
    try:
        for place, engine in enumerate(wanted):
            port = first_port + 10 * place
            try:
                engines.python(engine.environment, settings)
            except DownloadError as error:
                console.print(f"  [yellow]{engine.name} is left out: {error}[/]")
                continue
            console.print(f"  [cyan]•[/] {engine.name}")
            running.append(
                Served(engine, settings, model, port)
                if engine.is_served
                else Process(engine, settings, model)
            )
        yield running
    finally:
        for engine_running in running:
            engine_running.close()


class Results:
    """The figures of a run, a line each in a file."""

    def __init__(self, file: Path, *, fresh: bool) -> None:
        self.file = file
        if fresh:
            file.unlink(missing_ok=True)

    def add(self, engine: Engine, case: str, figures: Figures) -> None:
        """Write one line."""
        line = {"engine": engine.name, "precision": engine.precision, "case": case} | figures
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines, in order."""
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def compare(
    running: Sequence[Process | Served], results: Results, reference: Engine = REFERENCE
) -> None:
    """Write the cosines of each engine's vectors to the reference's, and of a text embedded alone
    to the same text in a batch.
    """
    [expected] = [process.vectors()[0] for process in running if process.engine is reference]
    for process in running:
        together, alone = process.vectors()
        cosines = vectors.cosine(together, expected)
        figures = {
            "mean_cosine": float(cosines.mean()),
            "min_cosine": float(cosines.min()),
            "invariance": float(vectors.cosine(together[:ALONE], alone).min()),
        }
        results.add(process.engine, "vectors", figures)


def measure(
    running: Sequence[Process | Served], cases: Sequence[Case], rounds: int, results: Results
) -> None:
    """Measure every case, each engine in turn, once to warm and then `rounds` times; write each
    engine's start and the memory that it has at the end.
    """
    steps = {
        f"{case.name}, {process.engine.name}": (case, process)
        for case in cases
        for process in running
        if process.engine.is_served or case.way != "beside"
    }
    with Progress("bench", list(steps), rounds + 1) as progress:
        for number in range(rounds + 1):
            for name, (case, process) in steps.items():
                with progress.step(name):
                    figures = process.measure(case)
                if number:
                    results.add(process.engine, case.name, {"count": case.size} | figures)
    for process in running:
        memory_mb = process.memory_bytes() / 1e6
        figures = {"cold_start_s": process.cold_start_s, "memory_mb": memory_mb}
        results.add(process.engine, "process", figures)


def measure_limit(settings: Settings, model: str, results: Results) -> None:
    """Write the operations of each case, and how many of them this machine does a second."""
    console.print("  [cyan]•[/] the machine's matrix rate")
    needed = limit.work(settings, model)
    texts_of = texts()
    for precision, libraries in limit.rates(settings, model).items():
        engine = Engine("limit", precision, ())
        results.add(engine, "rates", {"rates": libraries})
        for case in (case for case in CASES if case.way != "beside"):
            lengths = limit.lengths(settings, model, texts_of[case.texts][: case.size])
            operations = needed.operations(lengths)
            seconds = operations / max(libraries.values())
            figures = {"count": case.size, "seconds": seconds, "operations": operations}
            results.add(engine, case.name, figures)


def bench(
    settings: Settings,
    model: str,
    precisions: Sequence[str],
    cases: Sequence[str],
    named: Sequence[str],
    rounds: int,
    *,
    fresh: bool,
) -> Path:
    """Measure the engines `named`, or all; print the tables and write the report; its path."""
    results = Results(settings.home / "bench" / "results.jsonl", fresh=fresh)
    with started(settings, model, select(precisions, named)) as running:
        compare(running, results)
        measure(
            running, [case for case in CASES if not cases or case.name in cases], rounds, results
        )
    measure_limit(settings, model, results)
    return tables.write(settings, model, results.lines())
