"""How fast this machine multiplies matrices of a model's shapes. This is run as a file in the
environment of sentence-transformers, which has the fastest libraries.

The best of several libraries and row counts stands for the machine, so the limit is a hard one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino.opset13 as ops  # type: ignore[import-not-found]
import torch

ROWS = (128, 512, 2048)
LAYERS = 6
SECONDS = 1.0
LEVELS = 256


def rates(hidden: int, inner: int, threads: int) -> dict[str, dict[str, float]]:
    """Operations a second (a multiplication and an addition are two): precision → library → best
    over ROWS.
    """
    best: dict[str, dict[str, float]] = {"fp32": {}, "int8": {}}
    for rows in ROWS:
        operations = 2 * rows * hidden * inner * 2 * LAYERS
        for precision, library, run, calls in (
            ("fp32", "torch", _torch(rows, hidden, inner, threads), 1),
            ("fp32", "numpy", _numpy(rows, hidden, inner), 1),
            ("fp32", "openvino", *_openvino(rows, hidden, inner, threads, quantised=False)),
            ("int8", "openvino", *_openvino(rows, hidden, inner, threads, quantised=True)),
        ):
            rate = operations * calls / _least_s(run)
            best[precision][library] = max(rate, best[precision].get(library, 0.0))
    return best


def _least_s(run: Callable[[], object]) -> float:
    run()
    least, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least


def _weights(hidden: int, inner: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    shapes = [(hidden, inner), (inner, hidden)] * LAYERS
    return [(random.standard_normal(s) / s[0] ** 0.5).astype(np.float32) for s in shapes]


def _torch(rows: int, hidden: int, inner: int, threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    weights = [torch.from_numpy(weight) for weight in _weights(hidden, inner)]
    ones = torch.ones(rows, hidden)

    def run() -> object:
        with torch.inference_mode():
            x = ones
            for weight in weights:
                x = x @ weight
            return x

    return run


def _numpy(rows: int, hidden: int, inner: int) -> Callable[[], object]:
    weights = _weights(hidden, inner)
    ones = np.ones((rows, hidden), np.float32)

    def run() -> object:
        x = ones
        for weight in weights:
            x = x @ weight
        return x

    return run


def _openvino(
    rows: int, hidden: int, inner: int, threads: int, *, quantised: bool
) -> tuple[Callable[[], object], int]:
    """As many runs at once as there are threads, each on one; and how many."""
    parameter = x = ops.parameter([rows, hidden], np.float32)
    for weight in _weights(hidden, inner):
        x = ops.matmul(
            _levels(x, -8.0, 8.0, LEVELS) if quantised else x,
            _levels(ops.constant(weight), -1.0, 1.0, LEVELS - 1)
            if quantised
            else ops.constant(weight),
            transpose_a=False,
            transpose_b=False,
        )
    compiled = openvino.compile_model(
        openvino.Model([x], [parameter]),
        "CPU",
        {
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        },
    )
    queue = openvino.AsyncInferQueue(compiled, threads)
    values = np.ones((rows, hidden), np.float32)

    def run() -> None:
        for _ in range(threads):
            queue.start_async(values, share_inputs=True)
        queue.wait_all()

    return run, threads


def _levels(node: openvino.Node, low: float, high: float, levels: int) -> openvino.Node:
    ends = [np.float32(end) for end in (low, high, low, high)]
    return ops.fake_quantize(node, *ends, levels)


if __name__ == "__main__":
    print(json.dumps(rates(*map(int, sys.argv[1:]))))
