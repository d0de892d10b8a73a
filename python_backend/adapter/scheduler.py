"""Opens an ONNX model and its scheduler as the model's config.pbtxt asks for.

It reads `optimization.execution_accelerators`, `instance_group` and the parameters
`intra_op_thread_count`, `streams`, `micro_batch_tokens`, `max_tokens` and `precision`. The step of
an ensemble has no `precision`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from adapter import triton
from adapter.metrics import Metrics
from halimede_engine import arithmetic, batching, cores, session
from halimede_engine.engine import MakeRows
from halimede_engine.scheduler import Scheduler
from halimede_engine.session import OnRun, Session
from halimede_ops.spec import MAX_REQUEST_BYTES

STREAMS = 2
"""Default number of micro-batches that an instance runs at the same time, each on its share of the
threads."""
NICENESS = 5
"""Niceness of the threads that run micro-batches side by side, and of the bulk reader. With 5, an
interactive request beside bulk gets three quarters of each core; with 10 it was not answered
sooner."""

MAX_BULK_BYTES = 8 * MAX_REQUEST_BYTES
"""Maximum bytes of text in all unanswered bulk requests of an instance."""

Opened = tuple[Session, list[str]]
"""A session, and the names of the accelerators that this onnxruntime lacks."""


def open_scheduler(
    config: triton.ModelConfig,
    path: Path,
    kind: str,
    metrics: Metrics,
    make_rows: MakeRows = list,
    size_bytes: Callable[[Any], int] = lambda item: 0,
    max_requests: int | None = None,
) -> Scheduler:
    """A scheduler that runs the model.onnx at `path` and counts its runs in `metrics`.

    Args:
        config: the model's config.
        path: the model.onnx.
        kind: the instance's kind, CPU or GPU.
        metrics: counters of this process.
        make_rows: makes one row of each item; by default the items are rows.
        size_bytes: bytes of text of one item; by default unknown.
        max_requests: maximum number of unanswered requests in each lane.

    Raises:
        TritonModelException: the model cannot be opened.
    """
    threads = _threads(config)
    streams = min(int(config.parameter("streams", str(STREAMS))), threads)
    triton.inform(f"{config.name}: {threads=}, {streams=}, of {cores.read()}")
    shared, lone = _open_sessions(
        config, path, kind, streams, triton.reported(metrics.count_run_tokens)
    )
    return Scheduler(
        shared.run_outputs,
        shared.plan,
        streams,
        make_rows=make_rows,
        run_alone=lone.run_outputs,
        size_bytes=size_bytes,
        on_run=metrics.count_run,
        on_error=triton.report,
        on_broken=triton.end_process,
        clock=time.monotonic,
        max_requests=max_requests,
        max_bulk_bytes=MAX_BULK_BYTES,
        reader_niceness=NICENESS,
    )


def _open_sessions(
    config: triton.ModelConfig, path: Path, kind: str, streams: int, on_run: OnRun
) -> tuple[Session, Session]:
    """The session that `streams` micro-batches share, and the one for lone runs."""
    open_session = partial(
        session.open_session,
        path,
        _accelerators(config, kind),
        _threads(config),
        max_tokens=int(config.parameter("max_tokens", "0")) or None,
        on_run=on_run,
    )
    micro_batch_tokens = int(
        config.parameter("micro_batch_tokens", str(batching.MICRO_BATCH_TOKENS))
    )
    open_shared = partial(open_session, streams, micro_batch_tokens=micro_batch_tokens)
    if kind == "CPU":
        # OpenVINO divides its threads between the streams when it opens a model. A session that
        # has all threads, or runs beside the streams, needs a model of its own.
        shared, missing = triton.load(lambda: _open_at_lower_priority(open_shared))
        tight_padding = config.parameter("precision") in session.TIGHT_PADDING
        lone, _ = triton.load(lambda: open_session(1, tight_padding=tight_padding))
    else:
        shared, missing = triton.load(open_shared)
        lone = shared
    for name in missing:
        triton.warn(
            f"{config.name}: this onnxruntime has no {name}; the CPU provider serves instead"
        )
    if any(arithmetic.is_missing(entry.parameters) for entry in _accelerators(config, kind)):
        triton.warn(f"{config.name}: this CPU has no bf16; it computes in f32, at half the speed")
    return shared, lone


def _open_at_lower_priority(open_session: Callable[[], Opened]) -> Opened:
    """Open a session whose threads leave most of the cores to other work that needs them.

    On Linux each thread has its own niceness, and the threads that it starts inherit it. If a
    stream has several threads, OpenVINO takes the others from a pool that all its models share;
    their niceness is then that of whichever model started them.
    """
    with ThreadPoolExecutor(1, initializer=os.nice, initargs=(NICENESS,)) as pool:
        return pool.submit(open_session).result()


def _accelerators(config: triton.ModelConfig, kind: str) -> list[session.Accelerator]:
    configured = config.fields.get("optimization", {}).get("execution_accelerators", {})
    gpu = configured.get("gpu_execution_accelerator", []) if kind == "GPU" else []
    accelerators = [
        session.Accelerator(entry["name"], entry.get("parameters", {}))
        for entry in [*gpu, *configured.get("cpu_execution_accelerator", [])]
    ]
    # CUDA runs the parts of a graph that TensorRT does not support.
    if kind == "GPU" and "cuda" not in [entry["name"] for entry in gpu]:
        accelerators.append(session.Accelerator("cuda"))
    return accelerators


def _threads(config: triton.ModelConfig) -> int:
    """CPU threads of this instance: the config's number, else an equal share of the cores."""
    configured = int(config.parameter("intra_op_thread_count", "0"))
    instances = sum(group.get("count", 1) for group in config.fields.get("instance_group", []))
    return configured or max(1, cores.available() // max(1, instances))
