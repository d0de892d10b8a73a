"""The rate of Triton under load against that of the engine alone, in one run.

The load comes from NVIDIA's perf_analyzer. Its last build that runs on glibc 2.36 is in the wheel
`tritonclient==2.46.0`. Server and engine are measured in turn, so that both see the machine in the
same state; the server is up but idle while the engine runs.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from halimede_engine.session import FILE_NAME
from halimede_ops.errors import HalimedeError
from halimede_repository import configs
from halimede_tools.bench import closed_loop, report
from halimede_tools.build.download import fetch_wheel
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

WHEEL = "tritonclient==2.46.0"
RATIO = 0.75
"""Goal: the server's texts/s over the engine's."""
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton")
CONCURRENCY = 32
TEXTS = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """One precision's figures: medians over the rounds."""

    precision: str
    engine: float
    """Texts/s of one process that is given all texts at once."""
    engine_in_hand: float
    """Texts/s of one process that is given CONCURRENCY texts at a time."""
    server: float
    """Texts/s of Triton with CONCURRENCY single-text requests on their way."""
    p50_ms: float
    p99_ms: float

    @property
    def ratio(self) -> float:
        """Server over engine."""
        return self.server / self.engine


def perf(settings: Settings, model: str, precisions: Sequence[str], rounds: int) -> Path:
    """Measure, print the table and write the report; the report's path.

    Raises:
        HalimedeError: perf_analyzer cannot be had, or ended with an error.
    """
    analyzer = PerfAnalyzer(settings.home / "perf")
    steps = [f"{name}, {part}" for name in precisions for part in ("engine", "server")]
    with Progress("bench server", steps, rounds) as progress:
        rows = [
            _measure(settings, analyzer, model, precision, rounds, progress)
            for precision in precisions
        ]
    return report.publish(
        report.FOLDER / "server-against-engine.md",
        "Server against engine",
        report.goals(goal(row) for row in rows),
        report.origin("halimede bench server", model, PACKAGES),
        _details(rows, rounds),
    )


def goal(row: Row) -> report.Goal:
    """Whether the server reaches RATIO of the engine."""
    name = f"server over engine, {row.precision}"
    return report.Goal(name, f"{row.ratio:.0%}", f"at least {RATIO:.0%}", row.ratio >= RATIO)


def _measure(
    settings: Settings,
    analyzer: PerfAnalyzer,
    model: str,
    precision: str,
    rounds: int,
    progress: Progress,
) -> Row:
    name = served_name(model, precision)
    run = settings.home / "run" / "perf"
    run.mkdir(parents=True, exist_ok=True)
    options = wheel.Options(http_port=18000, grpc_port=18001, metrics_port=18002, models=(name,))
    served, latencies, engine, in_hand = [], [], [], []
    console.print(f"  {precision}: starting Triton and warming it")
    with wheel.serve(settings.repository, settings.python_backend, run, options) as server:
        analyzer.run(name, server.grpc_address)
        for _ in range(rounds):
            with progress.step(f"{precision}, engine"):
                whole_rate, in_hand_rate = engine_alone(settings, name, model)
            engine.append(whole_rate)
            in_hand.append(in_hand_rate)
            with progress.step(f"{precision}, server"):
                load = analyzer.run(name, server.grpc_address)
            served.append(load["Inferences/Second"])
            latencies.append((load["p50 latency"] / 1000, load["p99 latency"] / 1000))
            console.print(
                f"  {precision}: engine {whole_rate:.0f} ({in_hand_rate:.0f} with {CONCURRENCY} in "
                f"hand), server {served[-1]:.0f} texts/s",
                markup=False,
            )
    return Row(
        precision,
        statistics.median(engine),
        statistics.median(in_hand),
        statistics.median(served),
        statistics.median(p50 for p50, _ in latencies),
        statistics.median(p99 for _, p99 in latencies),
    )


def engine_alone(settings: Settings, name: str, model: str) -> tuple[float, float]:
    """Texts/s of a process of its own: all texts at once, and CONCURRENCY at a time."""
    steps = configs.read(settings.repository, name).steps
    onnx, tokenizer = steps[f"{name}-onnx"] / FILE_NAME, steps[f"{model}-tokenizer"]
    command = [sys.executable, "-m", "halimede_tools.bench.server", str(onnx), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole, in_hand = done.stdout.split()
    return float(whole), float(in_hand)


def engine_texts_per_s(onnx: Path, tokenizer: Path) -> tuple[float, float]:
    """This process's texts/s, warm: all texts at once, and CONCURRENCY at a time."""
    from halimede_ops import spec
    from halimede_tools.build.towers import Engine, text_rows

    facts = spec.load(tokenizer)
    engine = Engine(onnx, text_rows(tokenizer, facts), facts)
    texts = corpus.mixed_texts(TEXTS)
    parts = [texts[start : start + CONCURRENCY] for start in range(0, TEXTS, CONCURRENCY)]

    def texts_per_s(calls: Sequence[Sequence[str]]) -> float:
        closed_loop.threads(engine.embed, calls, 1).raise_errors()  # warms
        load = closed_loop.threads(engine.embed, calls, 1)
        load.raise_errors()
        return TEXTS / load.seconds

    return texts_per_s([texts]), texts_per_s(parts)


class PerfAnalyzer:
    """NVIDIA's load generator, unpacked from its wheel into `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._binary = folder / "perf_analyzer"
        if not self._binary.exists():
            self._unpack()
        self._data = folder / "texts.json"
        rows = [{"TEXT": [text]} for text in corpus.mixed_texts(TEXTS)]
        self._data.write_text(json.dumps({"data": rows}))
        self._environment = {**os.environ, "LD_LIBRARY_PATH": str(self._libraries())}

    def run(self, model: str, address: str, concurrency: int = CONCURRENCY) -> dict[str, float]:
        """The figures of one load: each column of perf_analyzer's report (latencies in us)."""
        report = self._folder / "report.csv"
        command = [str(self._binary), "-m", model, "-u", address, "-i", "grpc", "-b", "1"]
        command += ["--input-data", str(self._data), "--concurrency-range", str(concurrency)]
        # One thread, or every thread walks the texts in step: all requests on their way are the
        # same text, and of 1000 texts only every 32nd is sent.
        command += ["--async", "--max-threads", "1", "--measurement-mode", "count_windows"]
        command += ["--measurement-request-count", str(TEXTS), "-s", "30", "-f", str(report)]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HalimedeError(f"perf_analyzer failed: {(done.stderr or done.stdout)[-400:]}")
        with report.open() as file:
            row = next(csv.DictReader(file))
        return {name: float(value) for name, value in row.items()}

    def _unpack(self) -> None:
        package = fetch_wheel(WHEEL, self._folder, "--platform", "manylinux1_x86_64")
        with zipfile.ZipFile(package) as archive:
            inside = next(n for n in archive.namelist() if n.endswith("/bin/perf_analyzer"))
            part = self._binary.with_suffix(".part")
            with archive.open(inside) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file)
        part.chmod(0o755)
        part.rename(self._binary)

    def _libraries(self) -> Path:
        """A folder with the two libraries the binary wants under their plain names; Triton's
        wheel carries both.
        """
        folder = self._folder / "lib"
        folder.mkdir(exist_ok=True)
        libraries = wheel.wheel_libraries()
        for plain, pattern in (
            ("libcudart.so.12", "libcudart-*.so.12*"),
            ("libb64.so.0d", "libb64-*.so.0d"),
        ):
            link = folder / plain
            link.unlink(missing_ok=True)
            link.symlink_to(next(libraries.glob(pattern)))
        return folder


def _details(rows: Sequence[Row], rounds: int) -> list[str]:
    columns = f"precision|engine|{CONCURRENCY} in hand|server|server / engine|p50 ms|p99 ms"
    return [
        f"{TEXTS} mixed texts, texts/s, medians of {rounds} rounds, engine and server in turn. "
        f"*engine*: one process, all texts at once. *{CONCURRENCY} in hand*: the same process, "
        f"{CONCURRENCY} texts at a time, as many as the server has to choose from. *server*: "
        f"perf_analyzer over gRPC, {CONCURRENCY} single-text requests on their way; the load "
        "generator runs on the same cores. [Why a goal is missed](limits.md).",
        "",
        *report.table(
            columns.split("|"),
            [
                (
                    row.precision,
                    f"{row.engine:.0f}",
                    f"{row.engine_in_hand:.0f}",
                    f"{row.server:.0f}",
                    f"{row.ratio:.0%}",
                    f"{row.p50_ms:.0f}",
                    f"{row.p99_ms:.0f}",
                )
                for row in rows
            ],
        ),
    ]


if __name__ == "__main__":
    print(*engine_texts_per_s(Path(sys.argv[1]), Path(sys.argv[2])))
