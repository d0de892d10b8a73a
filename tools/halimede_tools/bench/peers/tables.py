"""The report of a run of all engines: tables, and a picture of them."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halimede_engine import cores
from halimede_tools.bench import report
from halimede_tools.bench.peers import engines
from halimede_tools.bench.peers.engines import REFERENCE
from halimede_tools.build.repository import SUFFIXES
from halimede_tools.settings import Settings

ENGINE, SERVER, LIMIT = "halimede, in process", "halimede, Triton", "limit"
FP32 = f"{ENGINE}, fp32"
"""The engine in FP32, whichever precision is compared with it."""
LOADS = (32, 64)
Medians = Mapping[tuple[str, str], Mapping[str, float]]
"""Engine and case → medians of its figures."""
Figure = tuple[str, str, str]
"""A figure by its engine's title, its case and its name."""
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton", "tokenizers")


class Goal(NamedTuple):
    """A ratio of two figures that must be at least, or at most, a bound."""

    name: str
    sign: str
    """≥ or ≤."""
    bound: float
    format: str
    over: Figure
    under: Figure
    precision: str = ""
    """The only one that it is asked of; empty: all."""

    def cell(self, figures: Medians, precision: str) -> str:
        """The ratio, in bold when it misses the bound; empty without the figures."""
        values = []
        for title, case, figure in (self.over, self.under):
            of_any = {REFERENCE.title: REFERENCE.name, FP32: FP32}
            engine = of_any.get(title, f"{title}, {precision}")
            values.append(figures.get((engine, case), {}).get(figure))
        over, under = values
        if over is None or under is None or self.precision not in ("", precision):
            return ""
        ratio = over / under
        holds = ratio >= self.bound if self.sign == "≥" else ratio <= self.bound
        return f"{ratio:{self.format}}" if holds else f"**{ratio:{self.format}}**"


def _times_as_fast(name: str, bound: float, case: str, figure: str = "seconds") -> Goal:
    over, under = (REFERENCE.title, case, figure), (ENGINE, case, figure)
    return Goal(f"{name}: times as fast as PyTorch", "≥", bound, ".1f", over, under)


def _share(name: str, bound: float, figure: str) -> Goal:
    over, under = (ENGINE, "process", figure), (REFERENCE.title, "process", figure)
    return Goal(f"{name}, of PyTorch's", "≤", bound, ".0%", over, under)


def _server(load: int) -> Goal:
    over, under = ((title, f"concurrency {load}", "seconds") for title in (ENGINE, SERVER))
    name = f"single texts of {load} callers: Triton's rate, of the engine's"
    return Goal(name, "≥", 1.0, ".0%", over, under)


GOALS = (
    _times_as_fast("a single text", 7.5, "single", "p50_ms"),
    _times_as_fast("100 texts", 10.0, "100"),
    _times_as_fast("1000 texts", 12.5, "1000"),
    _share("memory", 0.5, "memory_mb"),
    _share("start", 1 / 6, "cold_start_s"),
    *(_server(load) for load in LOADS),
    Goal(
        "a single text on Triton: p99 beside bulk, times that alone",
        "≤",
        3.0,
        ".1f",
        (SERVER, "beside bulk", "p99_ms"),
        (SERVER, "single", "p99_ms"),
    ),
    Goal(
        "1000 texts: of the machine's matrix rate",
        "≥",
        0.8,
        ".0%",
        (LIMIT, "1000", "seconds"),
        (ENGINE, "1000", "seconds"),
        "fp32",
    ),
    Goal(
        "1000 texts: of the machine's INT8 rate",
        "≥",
        0.65,
        ".0%",
        (LIMIT, "1000", "seconds"),
        (ENGINE, "1000", "seconds"),
        "int8",
    ),
    *(
        Goal(
            f"{case} texts: times as fast as FP32",
            "≥",
            1.8,
            ".2f",
            (FP32, case, "seconds"),
            (ENGINE, case, "seconds"),
            "fp16",
        )
        for case in ("100", "1000", "long")
    ),
)


def write(settings: Settings, model: str, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write tables and picture of a run's lines, print them; the report's path."""
    figures = medians(lines)
    precisions = [name for name in SUFFIXES if any(line["precision"] == name for line in lines)]
    _draw(settings, figures, precisions)
    return report.publish(
        report.FOLDER / "peers.md",
        "Against peers",
        conclusion(figures, precisions),
        f"{report.origin('halimede bench', model, PACKAGES)}\n{_versions()}",
        [_explanation(lines), "", *_details(figures, precisions, lines)],
    )


def medians(lines: Iterable[Mapping[str, Any]]) -> Medians:
    """The median of each figure of each engine and case."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in lines:
        figures = values.setdefault((line["engine"], line["case"]), {})
        for name, value in line.items():
            if isinstance(value, int | float):
                figures.setdefault(name, []).append(value)
    return {
        place: {name: statistics.median(listed) for name, listed in figures.items()}
        for place, figures in values.items()
    }


def conclusion(figures: Medians, precisions: Sequence[str]) -> list[str]:
    """The table of GOALS, and what was reached of each by precision."""
    return report.table(
        ["goal", "bound", *precisions],
        [
            [
                goal.name,
                f"{goal.sign} {goal.bound:{goal.format}}",
                *(goal.cell(figures, precision) for precision in precisions),
            ]
            for goal in GOALS
        ],
    )


def _explanation(lines: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(
        line["case"] for line in lines if line["engine"] == REFERENCE.name and "seconds" in line
    )
    fewest, most = min(counts.values()), max(counts.values())
    rounds = str(fewest) if fewest == most else f"{fewest} or {most}"
    return (
        "A goal that is missed is bold; [why](limits.md). "
        f"All engines up, each in a process of its own on all cores, asked in turn; medians of "
        f"{rounds} rounds after one that warms. The same weights and texts. *one*: single texts "
        "of mixed length, one after the other. *100*, *1000*: mixed texts in one call. *long*: 32 "
        "texts of 256 tokens in one call. *8*, *32*, *64*: single texts of mixed length, so many "
        "at a time: of Triton requests over gRPC, whose load generator runs on the same cores, of "
        "the others threads. *memory*: proportional, at the end. *start*: from the start of the "
        "process to the first embedding. × and *cosine*: to sentence-transformers in PyTorch. "
        "*alone*: lowest cosine of a text alone to the same text in a batch. Our build publishes "
        "INT8 from a cosine of 0.995, and 0.9999 alone, on."
    )


def _details(
    figures: Medians, precisions: Sequence[str], lines: Sequence[Mapping[str, Any]]
) -> list[str]:
    parts = ["![texts a second](peers.svg)", ""]
    for precision in precisions:
        parts += [f"## {precision.upper()}", "", *_table(figures, precision), ""]
    parts += ["## Triton against the engine in process", "", *_served(figures, precisions), ""]
    parts += ["## Single texts beside bulk", "", *_beside(figures, precisions), ""]
    return [*parts, "## The limit", "", *_limits(figures, lines)]


def _versions() -> str:
    pinned = dict.fromkeys(
        requirement
        for name, requirements in engines.ENVIRONMENTS.items()
        if name != "plot"
        for requirement in requirements
    )
    return f"Peers: {', '.join(pinned)}. text-embeddings-inference has no wheel."


def _table(figures: Medians, precision: str) -> list[str]:
    columns = "engine|one: p50, p99 ms|100 ms|1000 s|×|long s|8|32|64 texts/s|memory MB|start s"
    return report.table(
        [*columns.split("|"), "cosine", "alone"],
        [
            _engine(figures, engine, precision)
            for engine in dict.fromkeys(name for name, _ in figures)
            if engine.endswith(f", {precision}") or engine == REFERENCE.name
        ],
    )


def _engine(figures: Medians, engine: str, precision: str) -> list[str]:
    single = figures.get((engine, "single"), {})
    process = figures.get((engine, "process"), {})
    compared = figures.get((engine, "vectors"), {})
    p50, p99 = _cell(single, "p50_ms", 1), _cell(single, "p99_ms", 1)
    return [
        engine.removesuffix(f", {precision}"),
        f"{p50}, {p99}" if p50 else "",
        _seconds(figures, engine, "100", 1000, 0),
        _seconds(figures, engine, "1000", 1, 2),
        _times(figures, engine, "1000"),
        _seconds(figures, engine, "long", 1, 2),
        *(_rate(figures, engine, f"concurrency {n}") for n in (8, 32, 64)),
        _cell(process, "memory_mb", 0),
        _cell(process, "cold_start_s", 2),
        _cell(compared, "mean_cosine", 6),
        _cell(compared, "invariance", 4),
    ]


def _cell(figures: Mapping[str, float], name: str, digits: int) -> str:
    return f"{figures[name]:.{digits}f}" if name in figures else ""


def _seconds(figures: Medians, engine: str, case: str, factor: float, digits: int) -> str:
    median = figures.get((engine, case))
    return f"{median['seconds'] * factor:.{digits}f}" if median else ""


def _times(figures: Medians, engine: str, case: str) -> str:
    """How many times as fast as the reference."""
    base, median = figures.get((REFERENCE.name, case)), figures.get((engine, case))
    return f"{base['seconds'] / median['seconds']:.2f}" if base and median else ""


def _rate(figures: Medians, engine: str, case: str) -> str:
    """Texts a second."""
    median = figures.get((engine, case))
    return f"{median['count'] / median['seconds']:.0f}" if median else ""


def _served(figures: Medians, precisions: Sequence[str]) -> list[str]:
    available = cores.available()
    columns = (
        "precision|engine texts/s|at a time|Triton texts/s|of engine|generator ms"
        "|of what is left|adds ms"
    )
    return [
        "*engine*: given all texts in one call. *of engine*: Triton's texts/s over it. "
        "*generator*: CPU that the load generator takes a text. *of what is left*: the same, with "
        f"the generator's CPU taken from the {available} cores that Triton had. *adds*: p50 of one "
        "request after the other, over that of the engine.",
        "",
        *report.table(
            columns.split("|"),
            [row for name in precisions for row in _served_rows(figures, name, available)],
        ),
    ]


def _served_rows(figures: Medians, precision: str, available: int) -> list[list[str]]:
    engine, server = f"{ENGINE}, {precision}", f"{SERVER}, {precision}"
    needed = [
        (engine, "singles"),
        (engine, "single"),
        (server, "single"),
        *((server, f"concurrency {load}") for load in LOADS),
    ]
    if not all(place in figures for place in needed):
        return []
    whole = figures[engine, "singles"]
    alone = whole["count"] / whole["seconds"]
    added_ms = figures[server, "single"]["p50_ms"] - figures[engine, "single"]["p50_ms"]
    rows = []
    for load in LOADS:
        median = figures[server, f"concurrency {load}"]
        rate = median["count"] / median["seconds"]
        left = 1 - median["cpu_s"] / (available * median["seconds"])
        rows.append(
            [
                precision,
                f"{alone:.0f}",
                str(load),
                f"{rate:.0f}",
                f"{rate / alone:.0%}",
                f"{median['cpu_s'] / median['count'] * 1000:.2f}",
                f"{rate / left / alone:.0%}",
                f"{added_ms:.1f}",
            ]
        )
    return rows


def _beside(figures: Medians, precisions: Sequence[str]) -> list[str]:
    rows = []
    for precision in precisions:
        alone = figures.get((f"{SERVER}, {precision}", "single"))
        beside = figures.get((f"{SERVER}, {precision}", "beside bulk"))
        if alone and beside:
            rows.append(
                [
                    precision,
                    f"{alone['p50_ms']:.1f}, {alone['p99_ms']:.1f}",
                    f"{beside['p50_ms']:.1f}, {beside['p99_ms']:.1f}",
                    f"{beside['p99_ms'] / alone['p99_ms']:.1f}",
                    f"{beside['bulk_texts_per_s']:.0f}",
                ]
            )
    columns = "precision|alone: p50, p99 ms|beside bulk: p50, p99 ms|p99 ×|bulk texts/s"
    return [
        "Triton's latency of single texts of mixed length, one after the other: alone, and while "
        "another client sends 1000 mixed texts in requests of 128, again and again.",
        "",
        *report.table(columns.split("|"), rows),
    ]


def _limits(figures: Medians, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rates = [
        f"{line['precision'].upper()}: "
        + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in line["rates"].items())
        + " billion operations a second."
        for line in lines
        if line["case"] == "rates"
    ]
    columns = "case|billion operations|FP32: limit s|ours s|of limit|INT8: limit s|ours s|of limit"
    rows = []
    for case in ("100", "1000", "long"):
        operations = figures.get((f"{LIMIT}, fp32", case), {}).get("operations", 0) / 1e9
        row = [case, f"{operations:.0f}"]
        for precision in ("fp32", "int8"):
            limit = figures.get((f"{LIMIT}, {precision}", case))
            ours = figures.get((f"{ENGINE}, {precision}", case))
            if limit and ours:
                row += [f"{limit['seconds']:.3f}", f"{ours['seconds']:.3f}"]
                row.append(f"{limit['seconds'] / ours['seconds']:.0%}")
            else:
                row += [""] * 3
        rows.append(row)
    return [*rates, "", *report.table(columns.split("|"), rows)]


def _draw(settings: Settings, figures: Medians, precisions: Sequence[str]) -> None:
    """`peers.svg`: texts a second of every engine, in one call and so many at a time."""
    rows = [
        {
            "engine": engine,
            "precision": precision,
            "rates": {
                case: median["count"] / median["seconds"]
                for (name, case), median in figures.items()
                if name == engine and "seconds" in median and "count" in median
            },
        }
        for precision in precisions
        for engine in dict.fromkeys(name for name, _ in figures)
        if engine.endswith(f", {precision}")
    ]
    subprocess.run(
        [
            str(engines.python("plot", settings)),
            str(Path(__file__).with_name("plot.py")),
            str(report.FOLDER / "peers.svg"),
        ],
        input=json.dumps(rows),
        text=True,
        check=True,
    )
