"""The client's in-process engine against sentence-transformers, in one run.

Each is a process of its own that stays up; they are asked in turn, so that both see the machine in
the same state.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools import machine
from tools.bench_worker import COUNTS, REFERENCE
from tools.repository import served_name
from tools.settings import ROOT, Settings
from tools.steps import console

PACKAGES = ("onnxruntime-openvino", "sentence-transformers", "torch")


class Process:
    """One engine in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench_worker", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.embed(1)
        self.cold_start_s = time.perf_counter() - began
        """From the start of Python to the first embedding."""

    def embed(self, count: int) -> float:
        """Seconds that the first `count` mixed texts take."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def memory_bytes(self) -> int:
        """Resident memory."""
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def bench_engine(settings: Settings, model: str, precisions: Sequence[str], rounds: int) -> Path:
    """Measure, print the table and write the report; the report's path."""
    source = settings.models / model / "source"
    started = {REFERENCE: Process(REFERENCE, str(source))}
    for precision in precisions:
        name = served_name(model, precision)
        started[precision] = Process("onnx", str(settings.repository), name)
    seconds: dict[str, dict[int, list[float]]] = {
        name: {count: [] for count in COUNTS} for name in started
    }
    for number in range(rounds + 1):
        for name, process in started.items():
            for count in COUNTS:
                took = process.embed(count)
                if number:  # the first round warms
                    seconds[name][count].append(took)
    report = ROOT / "docs" / "benchmarks" / "in-process.md"
    report.write_text(_report(model, started, seconds, rounds))
    for process in started.values():
        process.close()
    console.print(report.read_text(), markup=False)
    return report


def _report(
    model: str,
    started: dict[str, Process],
    seconds: dict[str, dict[int, list[float]]],
    rounds: int,
) -> str:
    ours = [name for name in started if name != REFERENCE]
    medians = {
        name: {count: statistics.median(seconds[name][count]) for count in COUNTS}
        for name in started
    }
    rows = [
        (f"texts: {count}, ms", {name: took[count] * 1000 for name, took in medians.items()}, 1)
        for count in COUNTS
    ]
    memory = {name: process.memory_bytes() / 1e6 for name, process in started.items()}
    cold = {name: process.cold_start_s for name, process in started.items()}
    rows += [("memory, MB", memory, 0), ("cold start, s", cold, 2)]
    lines = [
        "# In process",
        "",
        machine.taken("make bench-engine", model, PACKAGES),
        "",
        f"Mixed texts, medians of {rounds} rounds, in turn; each engine in a process of its own on "
        "all cores. *memory*: resident, after the rounds. *cold start*: from the start of Python "
        f"to the first embedding, once. × is {REFERENCE} (PyTorch, FP32) over ours.",
        "",
        f"| | {REFERENCE} | " + " | ".join(f"{name} | ×" for name in ours) + " |",
        "|---" * (2 + 2 * len(ours)) + "|",
    ]
    for title, figures, digits in rows:
        base = figures[REFERENCE]
        cells = [f"{figures[name]:.{digits}f} | {base / figures[name]:.1f}" for name in ours]
        lines.append(f"| {title} | {base:.{digits}f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
