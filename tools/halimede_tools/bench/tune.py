"""Tune: what runs a model fastest on this machine, found by measuring it here.

First the provider, the threads and the streams that share them, then the tokens of a run. All
candidates of a stage are open at once and asked in turn, so that each sees the machine in the same
state. Of those within ALIKE of the most texts a second, the one that answers a single text soonest
is chosen. A provider counts only if its vectors are those of the provider that the build checked.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from rich import box
from rich.table import Table

from halimede_engine import batching, session
from halimede_ops import spec, vectors
from halimede_ops.errors import InvalidInput
from halimede_repository import configs
from halimede_tools.bench import machine
from halimede_tools.build import repository, towers
from halimede_tools.build.samples import corpus
from halimede_tools.build.steps import console
from halimede_tools.settings import Settings

LEAST_ROUNDS = 3
TEXTS, IN_HAND, SINGLES = 128, 32, 8
"""Texts of a round, how many of them the engine has to choose from at a time, and of these how many
are embedded alone as well."""
ALIKE = 0.03
"""Rates that differ by less are alike: medians of a few rounds tell no more."""
BUDGETS = tuple(int(batching.MICRO_BATCH_TOKENS * times) for times in (1, 0.5, 2))
"""Tokens of a run to try."""
RESERVED = 6
"""Memory that is kept free for each way that is open, in sizes of the model's file."""
PACKAGES = ("onnxruntime-openvino", "numpy")

Rows = Sequence[session.Row | session.Pixels]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a model."""

    provider: str
    """Execution accelerator; empty: onnxruntime's own CPU engine."""
    threads: int
    streams: int
    micro_batch_tokens: int = batching.MICRO_BATCH_TOKENS

    def parameters(self) -> dict[str, str]:
        """As model_config.pbtxt has it."""
        return {
            "provider": self.provider,
            "intra_op_thread_count": str(self.threads),
            "streams": str(self.streams),
            "micro_batch_tokens": str(self.micro_batch_tokens),
        }


@dataclasses.dataclass(frozen=True)
class Found:
    """What a way was found to do: medians."""

    way: Way
    texts_per_s: float
    """IN_HAND texts at a time."""
    single_ms: float
    cosine: float
    """Lowest, to the vectors of the way that the build checked."""


def tune(settings: Settings, model: str, precisions: Sequence[str], seconds: float) -> None:
    """Measure each precision, and write what was found into the repository; print the tables.

    Raises:
        ModelNotFound: the repository has no such model.
        InvalidInput: it embeds no texts.
    """
    for precision in precisions:
        name = repository.served_name(model, precision)
        least_cosine = towers.BARS[precision].invariance
        found, best = measure(settings, model, name, least_cosine, seconds / len(precisions))
        record = {
            "choice": best.way.parameters(),
            "taken": machine.taken("make tune", name, PACKAGES),
            "table": [dataclasses.asdict(one) for one in found],
        }
        repository.tune(name, record, settings.repository)
        console.print(_table(name, found, best))


def measure(
    settings: Settings, model: str, name: str, least_cosine: float, seconds: float
) -> tuple[list[Found], Found]:
    """What each way does with one precision of a model, the build's own first; and the best.

    Raises:
        ModelNotFound: the repository has no such model.
        InvalidInput: it embeds no texts.
    """
    steps = configs.read(settings.repository, name).steps
    tokenizer = steps.get(f"{model}-tokenizer")
    if tokenizer is None:
        raise InvalidInput(f"{name} embeds no texts; tune takes models that do.")
    facts, onnx = spec.load(tokenizer), steps[f"{name}-onnx"] / session.FILE_NAME
    texts = random.Random(7).sample(corpus.mixed_texts(), TEXTS)
    rows = towers.text_rows(tokenizer, facts)(texts)
    stage = _Stage(onnx, facts.max_tokens, rows, seconds / 2)
    ways = candidates(len(os.sched_getaffinity(0)))
    fitting = settings.memory_limit_bytes // (RESERVED * session.file_bytes(onnx))
    found = stage.measure(ways[: max(2, fitting)])
    best = choose(found, least_cosine).way
    last = stage.measure([dataclasses.replace(best, micro_batch_tokens=n) for n in BUDGETS])
    return found + last, choose(last, least_cosine)


def choose(found: Sequence[Found], least_cosine: float) -> Found:
    """The way to run the model: of the fast ones with the right vectors, the one that answers a
    single text soonest.
    """
    right = [one for one in found if one.cosine >= least_cosine]
    most = max(one.texts_per_s for one in right)
    fast = [one for one in right if one.texts_per_s >= (1 - ALIKE) * most]
    return min(fast, key=lambda one: one.single_ms)


def candidates(cores: int) -> list[Way]:
    """The way that the build checked first, then the others of all providers that there are."""
    available = onnxruntime.get_available_providers()
    providers = [*towers.CPU_ACCELERATORS] if "OpenVINOExecutionProvider" in available else []
    threads = [cores, cores // 2] if cores >= 4 else [cores]  # half: one a core with two threads
    return [
        Way(provider, count, streams)
        for provider in (*providers, "")
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

    def measure(self, ways: Sequence[Way]) -> list[Found]:
        """What each way does: all of them in turn, until the time is up."""
        end = time.monotonic() + self._seconds
        opened = {way: self._open(way) for way in ways}
        rows = self._affordable(opened[ways[0]], len(ways))
        cosines = {way: self._cosine(one, rows) for way, one in opened.items()}
        rates: dict[Way, list[float]] = {way: [] for way in ways}
        singles: dict[Way, list[float]] = {way: [] for way in ways}
        while len(rates[ways[-1]]) < LEAST_ROUNDS or time.monotonic() < end:
            for way, one in opened.items():
                rates[way].append(_rate(one, rows))
                singles[way] += [_seconds(one, [row]) for row in rows[:SINGLES]]
        return [
            Found(
                way,
                statistics.median(rates[way]),
                statistics.median(singles[way]) * 1000,
                cosines[way],
            )
            for way in ways
        ]

    def _open(self, way: Way) -> session.Session:
        accelerators = [session.Accelerator(way.provider)] if way.provider else []
        opened, _ = session.open_session(
            self._model,
            accelerators,
            way.threads,
            way.streams,
            self._max_tokens,
            way.micro_batch_tokens,
        )
        return opened

    def _affordable(self, one: session.Session, ways: int) -> Rows:
        """As many rows as the ways can run LEAST_ROUNDS times, and once before, in the time."""
        _seconds(one, self._rows[:SINGLES])  # warms
        took_s = _seconds(one, self._rows[:SINGLES]) / SINGLES
        count = int(self._seconds / (took_s * ways * (LEAST_ROUNDS + 1)))
        return self._rows[: max(SINGLES, count)]

    def _cosine(self, one: session.Session, rows: Rows) -> float:
        """Lowest cosine to the first way's vectors. It warms this way as well."""
        found = one.run(rows)
        if self._expected is None:
            self._expected = found
        both = min(len(found), len(self._expected))
        return float(vectors.cosine(found[:both], self._expected[:both]).min())


def _rate(one: session.Session, rows: Rows) -> float:
    """Texts a second, IN_HAND at a time."""
    parts = [rows[first : first + IN_HAND] for first in range(0, len(rows), IN_HAND)]
    return len(rows) / sum(_seconds(one, part) for part in parts)


def _seconds(one: session.Session, rows: Rows) -> float:
    began = time.perf_counter()
    one.run(rows)
    return time.perf_counter() - began


def _table(name: str, found: Sequence[Found], best: Found) -> Table:
    columns = ("provider", "threads", "streams", "tokens", "texts/s", "one ms", "cosine", "")
    table = Table(*columns, title=name, box=box.SIMPLE)  # fits into 80 columns
    for one in found:
        way = one.way
        table.add_row(
            way.provider or "onnxruntime",
            *(str(count) for count in (way.threads, way.streams, way.micro_batch_tokens)),
            f"{one.texts_per_s:.0f}",
            f"{one.single_ms:.1f}",
            f"{one.cosine:.6f}",
            "chosen" if one is best else "",
        )
    return table
