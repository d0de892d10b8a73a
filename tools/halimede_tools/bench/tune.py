"""Tune: what runs a model fastest on this machine, by measuring it here.

First the provider, the threads and the streams that share them, then the tokens of a run. All
candidates of a stage are open at once and measured in turn, so that each sees the machine in the
same state. Among those within ALIKE of the highest rate, the one that answers a single text soonest
is chosen. A provider counts only if its vectors are those of the provider that the build checked.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from rich import box
from rich.console import Console
from rich.table import Table

from halimede_engine import arithmetic, batching, cores, session
from halimede_ops import spec, vectors
from halimede_ops.errors import InvalidInput
from halimede_repository import configs
from halimede_tools.bench import closed_loop, report
from halimede_tools.build import repository, towers
from halimede_tools.build.checks.arguments import check_writable
from halimede_tools.build.samples import corpus
from halimede_tools.progress import Progress
from halimede_tools.settings import Settings

LEAST_ROUNDS = 3
TEXTS, IN_HAND, SINGLES = 128, 32, 8
"""Texts of a round, how many of them the engine has to choose from at a time, and how many are
embedded alone as well."""
ALIKE = 0.03
"""Rates that differ by less are alike: medians of a few rounds show no more."""
BUDGETS = tuple(int(batching.MICRO_BATCH_TOKENS * times) for times in (1, 0.5, 2))
"""Tokens of a run to try."""
RESERVED = 6
"""Memory that is kept free for each open session, in sizes of the model's file."""
PACKAGES = ("onnxruntime-openvino", "numpy")
STAGES = ("provider, threads, streams", "tokens of a run")

Rows = Sequence[session.Row | session.Pixels]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a model."""

    provider: str
    """Execution accelerator; empty: onnxruntime's own CPU engine."""
    threads: int
    streams: int
    micro_batch_tokens: int = batching.MICRO_BATCH_TOKENS
    arithmetic: str = arithmetic.F32

    def parameters(self) -> dict[str, str]:
        """As config.pbtxt has it."""
        return {
            "provider": self.provider,
            "intra_op_thread_count": str(self.threads),
            "streams": str(self.streams),
            "micro_batch_tokens": str(self.micro_batch_tokens),
            "arithmetic": self.arithmetic,
        }


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one way does: medians."""

    way: Way
    texts_per_s: float
    """IN_HAND texts at a time."""
    single_ms: float
    cosine: float
    """Lowest, to the vectors of the way that the build checked."""


def tune(settings: Settings, model: str, precisions: Sequence[str], seconds: float) -> None:
    """Measure each precision, and write the fastest way into the repository; print the tables.

    Raises:
        ModelNotFound: the repository has no such model.
        InvalidInput: it embeds no texts, or a precision is unknown.
        BuildError: the repository cannot be written.
    """
    for precision in precisions:
        _text_steps(settings, model, precision)
    check_writable(settings.repository)
    steps = [f"{precision}, {stage}" for precision in precisions for stage in STAGES]
    tables = []
    with Progress("tune", steps, step_s=seconds / len(steps)) as progress:
        for precision in precisions:
            name = repository.served_name(model, precision)
            share_s = seconds / len(precisions)
            measured, best = measure(settings, model, precision, share_s, progress)
            record = {
                "choice": best.way.parameters(),
                "origin": report.origin("halimede tune", name, PACKAGES),
                "table": [dataclasses.asdict(measurement) for measurement in measured],
            }
            repository.tune(name, record, settings.repository)
            tables.append(_table(name, measured, best))
    Console().print(*tables)


def measure(
    settings: Settings, model: str, precision: str, seconds: float, progress: Progress
) -> tuple[list[Measurement], Measurement]:
    """What each way does with one precision of a model, the build's own first; and the best.

    Raises:
        ModelNotFound: the repository has no such model.
        InvalidInput: it embeds no texts.
    """
    name, bar = repository.served_name(model, precision), towers.BARS[precision]
    served, tokenizer = _text_steps(settings, model, precision)
    steps = served.steps
    facts, onnx = spec.load(tokenizer), steps[f"{name}-onnx"] / session.FILE_NAME
    texts = random.Random(7).sample(corpus.mixed_texts(), TEXTS)
    rows = towers.text_rows(tokenizer, facts)(texts)
    stage = _Stage(onnx, facts.max_tokens, rows, seconds / len(STAGES))
    record = json.loads((served.folder / "quality.json").read_text())
    ways = candidates(
        cores.available(), record["arithmetic"], record.get("engine", towers.OPENVINO)
    )
    fitting = settings.memory_limit_bytes // (RESERVED * session.file_bytes(onnx))
    with progress.step(f"{precision}, {STAGES[0]}"):
        first = stage.measure(ways[: max(2, fitting)])
    best = choose(first, bar).way
    with progress.step(f"{precision}, {STAGES[1]}"):
        last = stage.measure([dataclasses.replace(best, micro_batch_tokens=n) for n in BUDGETS])
    return first + last, choose(last, bar)


def _text_steps(settings: Settings, model: str, precision: str) -> tuple[configs.Ensemble, Path]:
    """A precision of a model that embeds texts, and its tokenizer's folder.

    Raises:
        ModelNotFound: the repository has no such model.
        InvalidInput: it embeds no texts, or the precision is unknown.
    """
    if precision not in repository.SUFFIXES:
        raise InvalidInput(f"precision is {precision!r}; use {', '.join(repository.SUFFIXES)}.")
    name = repository.served_name(model, precision)
    served = configs.read(settings.repository, name)
    tokenizer = served.steps.get(f"{model}-tokenizer")
    if tokenizer is None:
        raise InvalidInput(f"{name} embeds no texts; tune takes models that do.")
    return served, tokenizer


def choose(measured: Sequence[Measurement], bar: towers.Bar) -> Measurement:
    """The way to run the model: of the fast ones with the right vectors, the one that answers a
    single text soonest.

    Vectors of the arithmetic that the build checked are held to the bar of the same text in another
    batch, those of another arithmetic to the bar of the precision.
    """
    checked = measured[0].way.arithmetic
    right = [
        one
        for one in measured
        if one.cosine >= (bar.invariance if one.way.arithmetic == checked else bar.p1_cosine)
    ]
    highest = max(measurement.texts_per_s for measurement in right)
    fast = [
        measurement for measurement in right if measurement.texts_per_s >= (1 - ALIKE) * highest
    ]
    return min(fast, key=lambda measurement: measurement.single_ms)


def candidates(
    most_threads: int, checked: str = arithmetic.F32, engine: str = towers.OPENVINO
) -> list[Way]:
    """The way that the build checked, then the others, of all providers that are installed.

    Args:
        most_threads: cores of this machine.
        checked: the arithmetic that the build checked. Instead of bf16, f32 may be chosen.
        engine: the engine that the build checked, one of `towers.ACCELERATORS`. Where it is not
            OpenVINO, OpenVINO cannot run the model.
    """
    available = onnxruntime.get_available_providers()
    is_installed = session.OPENVINO in available
    providers = [*towers.ACCELERATORS[engine]] if is_installed else []
    plain = arithmetic.F32 if checked == arithmetic.BF16 else checked
    computed = [(name, each) for name in providers for each in dict.fromkeys((checked, plain))]
    # Half: one thread for each core that runs two.
    threads = [most_threads, most_threads // 2] if most_threads >= 4 else [most_threads]
    return [
        Way(provider, count, streams, arithmetic=each)
        for provider, each in (*computed, ("", plain))
        for count in threads
        for streams in sorted({1, 2, count // 2, count} - {0}, key=lambda each: each != 2)
        if streams <= count
    ]


class _Stage:
    """Measures ways to run one model on the same rows."""

    def __init__(
        self,
        model: Path,
        max_tokens: int,
        rows: Rows,
        seconds: float,
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._rows = rows
        self._seconds = seconds
        self._expected: np.ndarray | None = None
        """Vectors of the very first way."""

    def measure(self, ways: Sequence[Way]) -> list[Measurement]:
        """What each way does: all of them in turn, until the time is up."""
        end = time.monotonic() + self._seconds
        sessions = {way: self._open(way) for way in ways}
        rows = self._affordable(sessions[ways[0]], len(ways))
        cosines = {way: self._cosine(opened, rows) for way, opened in sessions.items()}
        rates: dict[Way, list[float]] = {way: [] for way in ways}
        singles_s: dict[Way, list[float]] = {way: [] for way in ways}
        while len(rates[ways[-1]]) < LEAST_ROUNDS or time.monotonic() < end:
            for way, opened in sessions.items():
                rates[way].append(len(rows) / _load(opened, rows, IN_HAND).seconds)
                singles_s[way] += _load(opened, rows[:SINGLES], 1).latencies_s
        return [
            Measurement(
                way,
                statistics.median(rates[way]),
                statistics.median(singles_s[way]) * 1000,
                cosines[way],
            )
            for way in ways
        ]

    def _open(self, way: Way) -> session.Session:
        asked = arithmetic.properties(way.arithmetic)
        accelerators = [session.Accelerator(way.provider, asked)] if way.provider else []
        opened, _ = session.open_session(
            self._model,
            accelerators,
            way.threads,
            way.streams,
            self._max_tokens,
            way.micro_batch_tokens,
        )
        return opened

    def _affordable(self, opened: session.Session, ways: int) -> Rows:
        """As many rows as the ways can run LEAST_ROUNDS times, and once before, in the time."""
        _load(opened, self._rows[:SINGLES], SINGLES)  # warms
        row_s = _load(opened, self._rows[:SINGLES], SINGLES).seconds / SINGLES
        count = int(self._seconds / (row_s * ways * (LEAST_ROUNDS + 1)))
        return self._rows[: max(SINGLES, count)]

    def _cosine(self, opened: session.Session, rows: Rows) -> float:
        """Lowest cosine to the first way's vectors. It warms this way as well."""
        embeddings = opened.run(rows)
        if self._expected is None:
            self._expected = embeddings
        both = min(len(embeddings), len(self._expected))
        return float(vectors.cosine(embeddings[:both], self._expected[:both]).min())


def _load(opened: session.Session, rows: Rows, size: int) -> closed_loop.Load:
    """Run the rows, `size` at a time, one call after the other."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    load = closed_loop.threads(opened.run, parts, 1)
    load.raise_errors()
    return load


def _table(name: str, measured: Sequence[Measurement], best: Measurement) -> Table:
    columns = ("provider", "in", "threads", "streams", "tokens", "texts/s", "one ms", "cosine", "")
    table = Table(*columns, title=name, box=box.SIMPLE)  # fits into 80 columns
    for measurement in measured:
        way = measurement.way
        table.add_row(
            way.provider or "onnxruntime",
            way.arithmetic,
            *(str(count) for count in (way.threads, way.streams, way.micro_batch_tokens)),
            f"{measurement.texts_per_s:.0f}",
            f"{measurement.single_ms:.1f}",
            f"{measurement.cosine:.6f}",
            "chosen" if measurement is best else "",
        )
    return table
