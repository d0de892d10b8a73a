"""Whether OpenVINO still needs `session.FIRST_RUNS`: `python tests/first_runs.py 200`.

Each process opens the default model with two streams and starts every shape for the first time in two
threads at the same moment, without the guard in half of the processes. It then compares the vectors of
further runs of each shape with those of onnxruntime's own CPU provider. 200 processes take about half
an hour on 2 cores; OpenVINO 2025.4 gave wrong vectors in about 1 of 70 without the guard.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from halimede_engine import session
from halimede_ops import vectors
from halimede_ops.text import Tokens
from halimede_repository import configs
from halimede_tools.settings import Settings

MODEL = "all-MiniLM-L6-v2"
STREAMS = 2
FURTHER_RUNS = 2
"""Runs of a shape by each thread after the first: a wrong stream stays wrong."""
COSINE = 0.9999
IDLE_S = 30.0
"""A process that takes no time of a core for this long hangs, however busy the machine is."""
LONGEST_CPU_S = 120.0
"""A process that takes more hangs too: it takes about 8 s."""
SHAPES = [(rows, 64) for rows in range(8, 1, -1)] + [(1, tokens) for tokens in range(16, 257, 16)]
"""Rows and tokens of each row. Rows of 64 tokens fill a packed row each. (8, 64) was seen wrong."""
RIGHT, WRONG, HUNG, DIED = "right", "wrong", "hung", "died"
GUARDED, UNGUARDED = "with the guard", "without the guard"


def model_path() -> Path:
    """The default model in FP32."""
    steps = configs.read(Settings().repository, MODEL).steps
    return steps[f"{MODEL}-onnx"] / session.FILE_NAME


def rows_of(shape: tuple[int, int]) -> list[session.Row]:
    """Texts of random words that fill the shape."""
    count, tokens = shape
    ids = np.random.default_rng(shape).integers(2000, 20_000, (count, tokens))
    return session.token_rows(Tokens(row.tolist(), tokens) for row in ids)


def wrong_shapes() -> int:
    """Number of shapes of which any run gives wrong vectors in this process."""
    openvino = [session.Accelerator("openvino")]
    opened, missing = session.open_session(model_path(), openvino, STREAMS, STREAMS)
    assert not missing, "onnxruntime-openvino is not installed"
    reference, _ = session.open_session(model_path(), threads=STREAMS)
    rows = [rows_of(shape) for shape in SHAPES]
    expected = [reference.run_together(of_shape) for of_shape in rows]
    together = threading.Barrier(STREAMS)
    wrong: set[int] = set()

    def run() -> None:
        try:
            for shape, of_shape in enumerate(rows):
                together.wait()
                for _ in range(1 + FURTHER_RUNS):
                    given = opened.run_together(of_shape)
                    if not vectors.cosine(given, expected[shape]).min() >= COSINE:
                        wrong.add(shape)
        except Exception:
            together.abort()  # or the other thread would wait for this one
            raise

    with ThreadPoolExecutor(STREAMS) as threads:
        for done in [threads.submit(run) for _ in range(STREAMS)]:
            done.result()
    return len(wrong)


def outcome(guard: str) -> str:
    """What became of a fresh process, one of RIGHT, WRONG, HUNG and DIED."""
    command = [sys.executable, __file__, guard]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        if hangs(process):
            process.kill()
            return HUNG
        wrong = process.stdout.read()
    if process.returncode:
        return DIED
    return WRONG if int(wrong) else RIGHT


def hangs(process: psutil.Popen) -> bool:
    """Wait until the process ends; return True if it hangs instead."""
    used_s, changed_s = 0.0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            if times.user + times.system > used_s + 0.05:
                used_s, changed_s = times.user + times.system, time.monotonic()
        if time.monotonic() - changed_s > IDLE_S or used_s > LONGEST_CPU_S:
            return True
    return False


def count(guard: str, processes: int) -> Counter[str]:
    """The outcomes of so many fresh processes, one after the other."""
    return Counter(outcome(guard) for _ in range(processes))


def main(argument: str) -> None:
    """Run one process, or a number of them with the guard and as many without; print what was seen."""
    if argument in (GUARDED, UNGUARDED):
        if argument == UNGUARDED:
            session.FIRST_RUNS = 0
        print(wrong_shapes())
        return
    for guard in (UNGUARDED, GUARDED):
        seen = count(guard, int(argument) // 2)
        print(f"{guard}: {', '.join(f'{number} {what}' for what, number in seen.items())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
