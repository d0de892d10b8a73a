"""The report of a run of all engines: tables, and a picture of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halimede_tools.bench import machine
from halimede_tools.bench.peers import engines as bench_peers
from halimede_tools.bench.peers.engines import REFERENCE
from halimede_tools.build.repository import SUFFIXES
from halimede_tools.build.steps import console
from halimede_tools.settings import ROOT, Settings

FOLDER = ROOT / "docs" / "benchmarks"
ENGINE, SERVER, LIMIT = "halimede, in process", "halimede, Triton", "limit"
LOADS = (32, 64)
Figures = Mapping[tuple[str, str], Mapping[str, float]]
"""Engine and case → medians of its figures."""
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton", "tokenizers")


def write(settings: Settings, model: str, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write tables and picture of a run's lines, print them; the report's path."""
    figures = medians(lines)
    precisions = [name for name in SUFFIXES if any(line["precision"] == name for line in lines)]
    report = FOLDER / "peers.md"
    report.write_text(_text(model, figures, precisions, lines))
    _draw(settings, figures, precisions)
    console.print(report.read_text(), markup=False)
    return report


def medians(lines: Iterable[Mapping[str, Any]]) -> Figures:
    """The median of each figure of each engine and case."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in lines:
        place = found.setdefault((line["engine"], line["case"]), {})
        for name, value in line.items():
            if isinstance(value, int | float):
                place.setdefault(name, []).append(value)
    return {
        place: {name: statistics.median(values) for name, values in listed.items()}
        for place, listed in found.items()
    }


def _text(
    model: str,
    figures: Figures,
    precisions: Sequence[str],
    lines: Sequence[Mapping[str, Any]],
) -> str:
    counts = Counter(
        line["case"] for line in lines if line["engine"] == REFERENCE.name and "seconds" in line
    )
    least, most = min(counts.values()), max(counts.values())
    rounds = str(least) if least == most else f"{least} or {most}"
    parts = [
        "# Against peers",
        "",
        machine.taken("make bench", model, PACKAGES),
        _versions(),
        "",
        f"All engines up, each in a process of its own on all cores, asked in turn; medians of "
        f"{rounds} rounds after one that warms. The same weights and texts. *one*: single texts "
        "of mixed length, one after the other. *100*, *1000*: mixed texts in one call. *long*: 32 "
        "texts of 256 tokens in one call. *8*, *32*, *64*: single texts of mixed length, so many "
        "at a time: of Triton requests over gRPC, whose load generator runs on the same cores, of "
        "the others threads. *memory*: proportional, at the end. *start*: from the start of the "
        "process to the first embedding. × and *cosine*: to sentence-transformers in PyTorch. "
        "*alone*: lowest cosine of a text alone to the same text in a batch. Our build publishes "
        "INT8 from a cosine of 0.995, and 0.9999 alone, on.",
        "",
        "![texts a second](peers.svg)",
        "",
    ]
    for precision in precisions:
        parts += [f"## {precision.upper()}", "", *_table(figures, precision), ""]
    parts += ["## Triton against the engine in process", "", *_served(figures, precisions), ""]
    parts += ["## Single texts beside bulk", "", *_beside(figures, precisions), ""]
    parts += ["## The limit", "", *_limits(figures, lines)]
    return "\n".join(parts) + "\n"


def _versions() -> str:
    pinned = dict.fromkeys(
        requirement
        for name, listed in bench_peers.ENVIRONMENTS.items()
        if name != "plot"
        for requirement in listed
    )
    return f"Peers: {', '.join(pinned)}. text-embeddings-inference has no wheel."


def _table(figures: Figures, precision: str) -> list[str]:
    engines = [
        engine
        for engine in dict.fromkeys(name for name, _ in figures)
        if (engine.endswith(f", {precision}") or engine == REFERENCE.name)
    ]
    lines = [
        "| engine | one: p50, p99 ms | 100 ms | 1000 s | × | long s | 8 | 32 | 64 texts/s "
        "| memory MB | start s | cosine | alone |",
        "|---" * 13 + "|",
    ]
    for engine in engines:
        cells = [engine.removesuffix(f", {precision}")]
        one = figures.get((engine, "single"), {})
        cells.append(
            f"{_cell(one, 'p50_ms', 1)}, {_cell(one, 'p99_ms', 1)}" if "p50_ms" in one else ""
        )
        cells.append(_seconds(figures, engine, "100", 1000, 0))
        cells.append(_seconds(figures, engine, "1000", 1, 2))
        cells.append(_times(figures, engine, "1000"))
        cells.append(_seconds(figures, engine, "long", 1, 2))
        cells += [_rate(figures, engine, f"concurrency {n}") for n in (8, 32, 64)]
        process = figures.get((engine, "process"), {})
        compared = figures.get((engine, "vectors"), {})
        cells += [_cell(process, "memory_mb", 0), _cell(process, "cold_start_s", 2)]
        cells += [_cell(compared, "mean_cosine", 6), _cell(compared, "invariance", 4)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(figures: Mapping[str, float], name: str, digits: int) -> str:
    return f"{figures[name]:.{digits}f}" if name in figures else ""


def _seconds(figures: Figures, engine: str, case: str, factor: float, digits: int) -> str:
    found = figures.get((engine, case))
    return f"{found['seconds'] * factor:.{digits}f}" if found else ""


def _times(figures: Figures, engine: str, case: str) -> str:
    """How many times as fast as the reference."""
    base, found = figures.get((REFERENCE.name, case)), figures.get((engine, case))
    return f"{base['seconds'] / found['seconds']:.2f}" if base and found else ""


def _rate(figures: Figures, engine: str, case: str) -> str:
    """Texts a second."""
    found = figures.get((engine, case))
    return f"{found['count'] / found['seconds']:.0f}" if found else ""


def _served(figures: Figures, precisions: Sequence[str]) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    lines = [
        "*engine*: given all texts in one call. *of engine*: Triton's texts/s over it. "
        "*generator*: CPU that the load generator takes a text. *of what is left*: the same, with "
        f"the generator's CPU taken from the {cores} cores that Triton had. *adds*: p50 of one "
        "request after the other, over that of the engine.",
        "",
        "| precision | engine texts/s | at a time | Triton texts/s | of engine | generator ms "
        "| of what is left | adds ms |",
        "|---" * 8 + "|",
    ]
    for precision in precisions:
        engine, server = f"{ENGINE}, {precision}", f"{SERVER}, {precision}"
        if (server, "concurrency 32") not in figures or (engine, "singles") not in figures:
            continue
        whole = figures[engine, "singles"]
        alone = whole["count"] / whole["seconds"]
        added = figures[server, "single"]["p50_ms"] - figures[engine, "single"]["p50_ms"]
        for load in LOADS:
            found = figures[server, f"concurrency {load}"]
            rate = found["count"] / found["seconds"]
            left = 1 - found["cpu_s"] / (cores * found["seconds"])
            lines.append(
                f"| {precision} | {alone:.0f} | {load} | {rate:.0f} | {rate / alone:.0%} "
                f"| {found['cpu_s'] / found['count'] * 1000:.2f} | {rate / left / alone:.0%} "
                f"| {added:.1f} |"
            )
    return lines


def _beside(figures: Figures, precisions: Sequence[str]) -> list[str]:
    lines = [
        "Triton's latency of single texts of mixed length, one after the other: alone, and while "
        "another client sends 1000 mixed texts in requests of 128, again and again.",
        "",
        "| precision | alone: p50, p99 ms | beside bulk: p50, p99 ms | p99 × | bulk texts/s |",
        "|---" * 5 + "|",
    ]
    for precision in precisions:
        alone = figures.get((f"{SERVER}, {precision}", "single"))
        beside = figures.get((f"{SERVER}, {precision}", "beside bulk"))
        if alone and beside:
            lines.append(
                f"| {precision} | {alone['p50_ms']:.1f}, {alone['p99_ms']:.1f} "
                f"| {beside['p50_ms']:.1f}, {beside['p99_ms']:.1f} "
                f"| {beside['p99_ms'] / alone['p99_ms']:.1f} | {beside['bulk_texts_per_s']:.0f} |"
            )
    return lines


def _limits(figures: Figures, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    written = [
        f"{line['precision'].upper()}: "
        + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in line["rates"].items())
        + " billion operations a second."
        for line in lines
        if line["case"] == "rates"
    ]
    written += [
        "",
        "| case | billion operations | FP32: limit s | ours s | of limit | INT8: limit s | ours s "
        "| of limit |",
        "|---" * 8 + "|",
    ]
    for case in ("100", "1000", "long"):
        cells = []
        for precision in ("fp32", "int8"):
            least = figures.get((f"{LIMIT}, {precision}", case))
            found = figures.get((f"{ENGINE}, {precision}", case))
            if least and found:
                cells.append(
                    f"{least['seconds']:.3f} | {found['seconds']:.3f} "
                    f"| {least['seconds'] / found['seconds']:.0%}"
                )
            else:
                cells.append(" | | ")
        needed = figures.get((f"{LIMIT}, fp32", case), {})
        operations = needed.get("operations", 0) / 1e9
        written.append(f"| {case} | {operations:.0f} | " + " | ".join(cells) + " |")
    return written


def _draw(settings: Settings, figures: Figures, precisions: Sequence[str]) -> None:
    """`peers.svg`: texts a second of every engine, in one call and so many at a time."""
    rows = [
        {
            "engine": engine,
            "precision": precision,
            "rates": {
                case: found["count"] / found["seconds"]
                for (name, case), found in figures.items()
                if name == engine and "seconds" in found and "count" in found
            },
        }
        for precision in precisions
        for engine in dict.fromkeys(name for name, _ in figures)
        if engine.endswith(f", {precision}")
    ]
    subprocess.run(
        [
            str(bench_peers.python("plot", settings)),
            str(Path(__file__).with_name("plot.py")),
            str(FOLDER / "peers.svg"),
        ],
        input=json.dumps(rows),
        text=True,
        check=True,
    )
