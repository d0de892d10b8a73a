"""Designs: the ensemble of three steps against one process that runs them all, in one run.

A Triton of each design is up at once; the loads go to one after the other, so that both see the
machine in the same state.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from halimede import Embedder
from halimede.observability import server_memory
from halimede_tools.bench import closed_loop, report
from halimede_tools.bench.serving.server import PACKAGES, TEXTS, PerfAnalyzer
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

DESIGNS = {"steps": "ensemble of three steps", "one": "one process"}
CALLERS = (1, 8, 32, 64)
BESIDE = "beside bulk"
LOADS = (*(f"{callers} callers" for callers in CALLERS), BESIDE)
LONE_TEXTS = 200
BULK_LEAD_S = 0.5
"""Time for bulk to fill the server before lone texts are sent beside it."""
FIRST_PORT = 18_000

Figures = dict[str, list[float]]
"""Name of a figure → its value in each round."""


def designs(settings: Settings, model: str, precisions: Sequence[str], rounds: int) -> Path:
    """Measure, print the table and write the report; the report's path."""
    analyzer = PerfAnalyzer(settings.home / "perf")
    steps = [f"{name}, {load}" for name in precisions for load in LOADS]
    rows = []
    with Progress("bench designs", steps, rounds) as progress:
        for precision in precisions:
            measured = _measure(settings, analyzer, model, precision, rounds, progress)
            rows += [[precision, DESIGNS[design], *_cells(measured[design])] for design in DESIGNS]
    rates = [f"{callers} callers texts/s" for callers in CALLERS]
    columns = [
        "precision", "design", *rates, "alone p50, p99 ms", "beside bulk p50, p99 ms",
        "bulk texts/s", "memory MB", "start s",
    ]  # fmt: skip
    return report.publish(
        report.FOLDER / "designs.md",
        "Two designs",
        report.table(columns, rows),
        report.origin("halimede bench designs", model, PACKAGES),
        [
            f"{TEXTS} mixed texts as single-text requests of perf_analyzer over gRPC, medians of "
            f"{rounds} rounds, the designs in turn, both up. *alone*, *beside bulk*: {LONE_TEXTS} "
            f"texts one after the other; beside them another client embeds {TEXTS} texts a call. "
            "*memory*: proportional, of Triton and its processes, at the end. *start*: from the "
            "start of Triton to the first embedding, its files in memory."
        ],
    )


def _measure(
    settings: Settings,
    analyzer: PerfAnalyzer,
    model: str,
    precision: str,
    rounds: int,
    progress: Progress,
) -> dict[str, Figures]:
    """The figures of each design."""
    name = served_name(model, precision)
    figures: dict[str, Figures] = {design: defaultdict(list) for design in DESIGNS}
    with contextlib.ExitStack() as stack:
        servers: dict[str, wheel.Server] = {}
        for number, design in enumerate(DESIGNS):
            console.print(f"  {precision}: starting {DESIGNS[design]}")
            began = time.monotonic()
            servers[design] = stack.enter_context(_served(settings, name, design, number))
            _lone(servers[design], name, 1)
            figures[design]["start"].append(time.monotonic() - began)
        for server in servers.values():  # warms
            analyzer.run(name, server.grpc_address)
            _lone(server, name, LONE_TEXTS)
        for _ in range(rounds):
            for callers, load in zip(CALLERS, LOADS, strict=False):
                with progress.step(f"{precision}, {load}"):
                    for design, server in servers.items():
                        rate = analyzer.run(name, server.grpc_address, callers)
                        figures[design][load].append(rate["Inferences/Second"])
            with progress.step(f"{precision}, {BESIDE}"):
                for design, server in servers.items():
                    for key, value in _latencies(server, name).items():
                        figures[design][key].append(value)
        for design, server in servers.items():
            figures[design]["memory"].append(_memory_mb(server))
    return figures


@contextlib.contextmanager
def _served(settings: Settings, name: str, design: str, number: int) -> Iterator[wheel.Server]:
    port = FIRST_PORT + 10 * number
    options = wheel.Options(
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        models=(name,),
        steps=design == "steps",
    )
    with (
        tempfile.TemporaryDirectory(dir=settings.home) as run,
        wheel.serve(settings.repository, settings.python_backend, Path(run), options) as server,
    ):
        yield server


def _latencies(server: wheel.Server, name: str) -> Mapping[str, float]:
    """Latencies of lone texts, alone and beside bulk, and the rate of the bulk."""
    alone = _lone(server, name, LONE_TEXTS)
    done = Event()
    mixed = corpus.mixed_texts(TEXTS)

    def send_bulk() -> float:
        calls, began = 0, time.monotonic()
        with Embedder(f"grpc://{server.grpc_address}", name) as embedder:
            while not done.is_set():
                embedder.embed(mixed)
                calls += 1
        return calls * len(mixed) / (time.monotonic() - began)

    with ThreadPoolExecutor(1) as sender:
        bulk = sender.submit(send_bulk)
        time.sleep(BULK_LEAD_S)
        beside = _lone(server, name, LONE_TEXTS)
        done.set()
    return {
        "alone p50": _percentile_ms(alone, 50),
        "alone p99": _percentile_ms(alone, 99),
        "beside p50": _percentile_ms(beside, 50),
        "beside p99": _percentile_ms(beside, 99),
        "bulk": bulk.result(),
    }


def _lone(server: wheel.Server, name: str, count: int) -> list[float]:
    """Seconds of each of `count` texts, one after the other."""
    texts = sorted(corpus.mixed_texts(), key=len)[:: len(corpus.mixed_texts()) // LONE_TEXTS]
    with Embedder(f"grpc://{server.grpc_address}", name) as embedder:
        embedder.embed("connects")
        load = closed_loop.threads(embedder.embed, texts[:count], 1)
    load.raise_errors()
    return load.latencies_s


def _percentile_ms(latencies_s: Sequence[float], percent: int) -> float:
    return statistics.quantiles(latencies_s, n=100, method="inclusive")[percent - 1] * 1000


def _memory_mb(server: wheel.Server) -> float:
    """Proportional memory of Triton and its processes."""
    return server_memory.used_bytes(server.process.pid) / 1e6


def _cells(figures: Figures) -> list[str]:
    median = {name: statistics.median(values) for name, values in figures.items()}
    return [
        *(f"{median[f'{callers} callers']:.0f}" for callers in CALLERS),
        f"{median['alone p50']:.1f}, {median['alone p99']:.1f}",
        f"{median['beside p50']:.1f}, {median['beside p99']:.1f}",
        f"{median['bulk']:.0f}",
        f"{median['memory']:.0f}",
        f"{median['start']:.1f}",
    ]
