"""torch in a process of its own: its threads spin for a while after a call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WORKER = """
import json, sys, time
import sentence_transformers
kind = getattr(sentence_transformers, sys.argv[1])
model = kind(sys.argv[2], device="cpu", local_files_only=True)
call = getattr(model, sys.argv[3])
print("ready", flush=True)
for line in sys.stdin:
    inputs, calls = json.loads(line)
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        call(inputs, show_progress_bar=False)
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds), flush=True)
"""
Timed = Callable[[object], list[float]]
"""Returns the seconds of each call with these inputs."""


@contextmanager
def opened(kind: str, folder: Path, method: str, calls: int) -> Iterator[Timed]:
    """Yield what times `calls` calls of a method of a model of sentence-transformers.

    `kind` is the name of its class, such as `CrossEncoder`.
    """
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, kind, str(folder), method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdout.readline()

        def timed(inputs: object) -> list[float]:
            print(json.dumps([inputs, calls]), file=worker.stdin, flush=True)
            assert worker.stdout is not None
            seconds: list[float] = json.loads(worker.stdout.readline())
            return seconds

        try:
            yield timed
        finally:
            worker.stdin.close()
