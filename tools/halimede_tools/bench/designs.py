"""Designs: the cost of the ensemble's contract, served in four ways, in one interleaved run.

All four are up in one Triton: the ensemble of three steps; the same without the pooler, which
cannot cut to DIMENSIONS and is the least that an ensemble with pooling in the graph can be; one
process beneath an ensemble of one step; and one process itself.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tritonclient.grpc as grpcclient

from halimede_repository import configs
from halimede_tools.bench import report
from halimede_tools.bench.server import CONCURRENCY, PACKAGES, TEXTS, PerfAnalyzer, engine_alone
from halimede_tools.build import model_config
from halimede_tools.build.model_config import Pin
from halimede_tools.build.repository import served_name
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

DESIGNS = {
    "steps": "ensemble: tokenizer, onnxruntime, pooler",
    "two": "ensemble: tokenizer, onnxruntime; no DIMENSIONS",
    "shell": "ensemble of one step: one process",
    "one": "one process",
}


class Load(NamedTuple):
    """One round of one design."""

    texts_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: Mapping[str, float]
    """CPU a text takes: process → ms."""


def designs(settings: Settings, model: str, precisions: Sequence[str], rounds: int) -> Path:
    """Measure, print the table and write the report; the report's path."""
    analyzer = PerfAnalyzer(settings.home / "perf")
    steps = [f"{name}, {part}" for name in precisions for part in ("engine", *DESIGNS)]
    rows = []
    with Progress("bench designs", steps, rounds + 1) as progress:
        for precision in precisions:
            rows += _measure(settings, analyzer, model, precision, rounds, progress)
    columns = "precision|design|texts/s|of engine|p50 ms|p99 ms|tritonserver|python"
    return report.publish(
        report.FOLDER / "designs.md",
        "Four designs",
        report.table(columns.split("|"), rows),
        report.origin("halimede bench designs", model, PACKAGES),
        [
            f"{TEXTS} mixed texts, {CONCURRENCY} single-text requests on their way over gRPC, "
            f"medians of {rounds} rounds; engine and designs in turn, all up in one Triton. *of "
            "engine*: over one process that is given all texts at once. *tritonserver*, *python*: "
            "CPU a text takes there, ms."
        ],
    )


def _measure(
    settings: Settings,
    analyzer: PerfAnalyzer,
    model: str,
    precision: str,
    rounds: int,
    progress: Progress,
) -> list[list[str]]:
    name = served_name(model, precision)
    engine: list[float] = []
    loads: dict[str, list[Load]] = {design: [] for design in DESIGNS}
    with tempfile.TemporaryDirectory(dir=settings.home) as folder:
        repository = Path(folder)
        lay_out(settings.repository, name, repository)
        options = wheel.Options(
            http_port=18000, grpc_port=18001, metrics_port=18002,
            models=tuple(f"{name}-{design}" for design in DESIGNS), steps=True,
        )  # fmt: skip
        run = repository / "run"
        run.mkdir()
        console.print(f"  {precision}: starting Triton")
        with wheel.serve(repository, settings.python_backend, run, options) as server:
            for number in range(rounds + 1):  # the first warms
                with progress.step(f"{precision}, engine"):
                    if number:
                        engine.append(engine_alone(settings, name, model)[0])
                for design, measured in loads.items():
                    with progress.step(f"{precision}, {design}"):
                        load = _load(analyzer, server, f"{name}-{design}")
                    if number:
                        measured.append(load)
    whole = statistics.median(engine)
    return [[precision, title, *_cells(loads[design], whole)] for design, title in DESIGNS.items()]


def lay_out(source: Path, name: str, target: Path) -> None:
    """Write a repository with the served `name` in every design."""
    served = configs.read(source, name)
    for step in served.steps:
        shutil.copytree(source / step, target / step, copy_function=os.link)
    ensemble = model_config.read(source / name / configs.CONFIG)
    one = model_config.read(source / name / "configs" / f"{configs.ONE_PROCESS}.pbtxt")
    process = Pin(f"{name}-one", int(served.folder.name))
    for design, made in {
        "steps": ensemble,
        "two": model_config.without_pooler(ensemble),
        "shell": model_config.shell(ensemble, process),
        "one": one,
    }.items():
        folder = target / f"{name}-{design}"
        shutil.copytree(source / name, folder)
        made.name = folder.name
        (folder / configs.CONFIG).write_text(model_config.to_text(made))


def _load(analyzer: PerfAnalyzer, server: wheel.Server, model: str) -> Load:
    texts, cpu_s = _texts(server, model), _cpu_s(server)
    figures = analyzer.run(model, server.grpc_address)
    more = _texts(server, model) - texts
    return Load(
        figures["Inferences/Second"],
        figures["p50 latency"] / 1000,
        figures["p99 latency"] / 1000,
        {name: (now - cpu_s[name]) / more * 1000 for name, now in _cpu_s(server).items()},
    )


def _texts(server: wheel.Server, model: str) -> float:
    """How many texts a model has answered."""
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        [figures] = client.get_inference_statistics(model).model_stats
    return float(figures.inference_count)


def _cpu_s(server: wheel.Server) -> dict[str, float]:
    """CPU seconds of Triton itself and of its Python processes together."""
    import psutil  # type: ignore[import-untyped]

    triton_itself = psutil.Process(server.process.pid)
    python = triton_itself.children(recursive=True)
    return {
        "tritonserver": sum(triton_itself.cpu_times()[:2]),
        "python": sum(sum(process.cpu_times()[:2]) for process in python),
    }


def _cells(loads: Sequence[Load], engine: float) -> list[str]:
    rate = statistics.median(load.texts_per_s for load in loads)
    cpu_ms = [
        statistics.median(load.cpu_ms[name] for load in loads)
        for name in ("tritonserver", "python")
    ]
    return [
        f"{rate:.0f}",
        f"{rate / engine:.0%}",
        f"{statistics.median(load.p50_ms for load in loads):.0f}",
        f"{statistics.median(load.p99_ms for load in loads):.0f}",
        *(f"{ms:.2f}" for ms in cpu_ms),
    ]
