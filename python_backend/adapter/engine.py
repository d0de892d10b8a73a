"""An ONNX model as its config.pbtxt asks for it: `optimization.execution_accelerators`,
`instance_group` and the parameters `intra_op_thread_count`, `streams`, `micro_batch_tokens`,
`max_tokens` and `precision`, which an ensemble's step does not have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapter import triton
from adapter.metrics import Metrics
from halimede_engine import batching, session
from halimede_engine.scheduler import ContinuousBatches

STREAMS = 2
"""Micro-batches that one instance runs at the same time, each on its share of the threads, unless
its config says otherwise."""
NICENESS = 5
"""Of the threads that run micro-batches side by side: a small request beside bulk gets three
quarters of each core. 10 served it no sooner."""
T = TypeVar("T")


def open_batches(
    config: triton.ModelConfig,
    path: Path,
    kind: str,
    metrics: Metrics,
    **waiting: Any,
) -> ContinuousBatches:
    """Continuous batches through the model.onnx at `path`, counted in `metrics`; `kind` is the
    instance's, CPU or GPU; `waiting` is what ContinuousBatches takes for what waits.
    """
    accelerators = _accelerators(config, kind)
    threads = _threads(config)
    streams = min(int(config.parameter("streams", str(STREAMS))), threads)
    max_tokens = int(config.parameter("max_tokens", "0")) or None
    micro_batch_tokens = int(
        config.parameter("micro_batch_tokens", str(batching.MICRO_BATCH_TOKENS))
    )

    def opened_with(streams: int, **how: Any) -> tuple[session.Session, list[str]]:
        return triton.load(
            lambda: session.open_session(
                path, accelerators, threads, streams, max_tokens, tell=metrics.ran_tokens, **how
            )
        )

    open_streams = partial(opened_with, streams, micro_batch_tokens=micro_batch_tokens)
    if kind == "CPU":
        # OpenVINO shares the threads between the streams for good: what has them all, or runs
        # beside the streams, needs a model of its own.
        opened, missing = _giving_way(open_streams)
        alone, _ = opened_with(1, pad_near=config.parameter("precision") in session.PADDED_NEAR)
    else:
        opened, missing = open_streams()
        alone = opened
    for name in missing:
        triton.warn(
            f"{config.name}: this onnxruntime has no {name}; the CPU provider serves instead"
        )
    run, run_alone = (
        one.run_with_heads if one.heads else one.run_together for one in (opened, alone)
    )
    return ContinuousBatches(
        run,
        opened.plan,
        streams,
        tell=metrics.ran,
        clock=time.monotonic,
        run_alone=run_alone,
        **waiting,
    )


def _giving_way(open_streams: Callable[[], T]) -> T:
    """What is opened; the threads it begins leave most of the cores to whatever else of this
    process, and of the server, wants them. On Linux a thread has a niceness of its own, and those
    it begins inherit it. Where a stream has several threads, OpenVINO takes the others from a pool
    that all its models share: they may have either niceness.
    """
    with ThreadPoolExecutor(1, initializer=os.nice, initargs=(NICENESS,)) as lower:
        return lower.submit(open_streams).result()


def _accelerators(config: triton.ModelConfig, kind: str) -> list[session.Accelerator]:
    asked = config.fields.get("optimization", {}).get("execution_accelerators", {})
    gpu = asked.get("gpu_execution_accelerator", []) if kind == "GPU" else []
    named = [entry["name"] for entry in gpu]  # what TensorRT does not take, CUDA does
    return [
        session.Accelerator(entry["name"], entry.get("parameters", {}))
        for entry in [*gpu, *asked.get("cpu_execution_accelerator", [])]
    ] + ([session.Accelerator("cuda")] if kind == "GPU" and "cuda" not in named else [])


def _threads(config: triton.ModelConfig) -> int:
    """CPU threads of this instance: what the config says, else its share of the cores."""
    asked = int(config.parameter("intra_op_thread_count", "0"))
    instances = sum(group.get("count", 1) for group in config.fields.get("instance_group", []))
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, instances))
