"""The gateway under load: single texts over HTTP, against direct gRPC and infinity's server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from halimede_ops.errors import ServeError
from halimede_tools.bench import http_load, report, triton_request
from halimede_tools.bench.closed_loop import Load
from halimede_tools.bench.peers import engines
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.serve.ports import free_ports
from halimede_tools.settings import Settings

CALLERS = (32, 64)
TEXTS = 1000
MAX_CHARACTERS = 2000
MIN_SHARE, MIN_TIMES = 0.85, 3.0
"""Goals: the gateway's texts/s over those of direct gRPC, and INT8's over infinity's best."""
DIRECT, GATEWAY = "direct gRPC", "gateway"
INFINITY = {"infinity, torch": "torch", "infinity, ONNX": "optimum"}
"""Way → engine of infinity. Its server is measured with FP32: it has no INT8 for CPUs."""
START_S = 180.0
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton", "fastapi", "uvicorn")

Send = Callable[[int], Load]
"""Sends every text by so many callers."""


def bench_gateway(
    settings: Settings, model: str, precisions: Sequence[str], rounds: int, with_peers: bool
) -> Path:
    """Measure, print the table and write the report. Return the report's path."""
    texts = [text for text in corpus.check_texts() if 0 < len(text) <= MAX_CHARACTERS]
    texts = (texts * TEXTS)[:TEXTS]
    rates: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as running:
        ways = dict(running.enter_context(_ours(settings, model, precisions, texts)))
        if with_peers:
            for way, engine in INFINITY.items():
                ways[way] = running.enter_context(_infinity(settings, model, engine, texts))
        steps = [f"{way}, {callers} callers" for callers in CALLERS for way in ways]
        with Progress("bench gateway", steps, rounds + 1) as progress:
            for number in range(rounds + 1):
                for callers in CALLERS:
                    for way, send in ways.items():
                        with progress.step(f"{way}, {callers} callers"):
                            rate = send(callers).per_s
                        if number:  # the first round warms
                            rates.setdefault((way, callers), []).append(rate)
    medians = {key: statistics.median(measured) for key, measured in rates.items()}
    rows = [
        [way, *(f"{medians[way, callers]:.0f}" for callers in CALLERS)]
        for way in dict.fromkeys(way for way, _ in medians)
    ]
    return report.publish(
        report.FOLDER / "gateway.md",
        "The gateway under load",
        [
            *report.goals(_goals(rates, precisions, with_peers)),
            "",
            *report.table(["texts a second", *(f"{n} callers" for n in CALLERS)], rows),
        ],
        report.origin("halimede bench gateway", model, PACKAGES),
        [
            f"{TEXTS:,} single texts a turn, of up to {MAX_CHARACTERS:,} characters; medians of "
            f"{rounds} rounds, in each of which every way has its turn. The load, the gateway and "
            "the server share the cores. The gateway is asked in OpenAI's dialect, with vectors as "
            "JSON numbers. A ratio is the median of those of the rounds."
        ],
    )


def _goals(
    rates: Mapping[tuple[str, int], Sequence[float]], precisions: Sequence[str], with_peers: bool
) -> Iterator[report.Goal]:
    for precision in precisions:
        shares = [
            _ratio(rates[f"{GATEWAY}, {precision}", n], rates[f"{DIRECT}, {precision}", n])
            for n in CALLERS
        ]
        yield report.Goal(
            f"{precision}: gateway over direct gRPC, {CALLERS[0]} and {CALLERS[1]} callers",
            " / ".join(f"{share:.0%}" for share in shares),
            f"at least {MIN_SHARE:.0%}",
            min(shares) >= MIN_SHARE,
        )
    if with_peers and "int8" in precisions:
        times = [
            min(_ratio(rates[f"{GATEWAY}, int8", n], rates[way, n]) for way in INFINITY)
            for n in CALLERS
        ]
        yield report.Goal(
            f"int8: gateway over infinity's best, {CALLERS[0]} and {CALLERS[1]} callers",
            " / ".join(f"{ratio:.1f} times" for ratio in times),
            f"at least {MIN_TIMES:g} times",
            min(times) >= MIN_TIMES,
        )


def _ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(rates, others, strict=True))


@contextlib.contextmanager
def _ours(
    settings: Settings, model: str, precisions: Sequence[str], texts: Sequence[str]
) -> Iterator[dict[str, Send]]:
    """Triton with the precisions, asked directly and through a gateway."""
    http, grpc, metrics, port = free_ports(4)
    names = {precision: served_name(model, precision) for precision in precisions}
    options = wheel.Options(
        http_port=http, grpc_port=grpc, metrics_port=metrics, models=tuple(names.values())
    )
    with (
        tempfile.TemporaryDirectory(dir=settings.home) as run,
        wheel.serve(settings.repository, settings.python_backend, Path(run), options) as server,
        _process(
            [
                *(sys.executable, "-m", "halimede", "gateway", "--no-access-log"),
                *("--url", server.grpc_address, "--model", names[precisions[0]]),
                *("--port", str(port)),
            ],
            port,
        ),
    ):
        yield {
            f"{way}, {precision}": send
            for precision, name in names.items()
            for way, send in {
                DIRECT: _direct(server.grpc_address, name, texts),
                GATEWAY: _posting(f"http://127.0.0.1:{port}/v1/embeddings", name, texts),
            }.items()
        }


def _direct(address: str, name: str, texts: Sequence[str]) -> Send:
    return lambda callers: triton_request.send_singly(address, name, texts, callers)


def _posting(url: str, name: str, texts: Sequence[str]) -> Send:
    bodies = [json.dumps({"model": name, "input": text}).encode() for text in texts]
    return lambda callers: http_load.post(url, bodies, callers)


@contextlib.contextmanager
def _infinity(settings: Settings, model: str, engine: str, texts: Sequence[str]) -> Iterator[Send]:
    """Infinity's own server with an engine of it."""
    [port] = free_ports(1)
    python = engines.python("infinity-server", settings)
    folder = engines.model_folder(settings, model)
    if engine == "optimum":
        folder = _onnx_folder(folder)
    command = [
        *(str(python.with_name("infinity_emb")), "v2", "--model-id", "."),
        *("--served-model-name", model, "--engine", engine, "--device", "cpu"),
        *("--port", str(port), "--no-bettertransformer", "--dtype", "float32"),
    ]
    with _process(command, port, folder):
        yield _posting(f"http://127.0.0.1:{port}/embeddings", model, texts)


def _onnx_folder(folder: Path) -> Path:
    """A folder of the model in FP32 as ONNX alone: of several graphs infinity takes INT8's, and it
    finds a graph only at the top of the folder that it runs in.
    """
    alone = folder.with_name(f"{folder.name}-onnx")
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir()
    for path in (*folder.glob("*.json"), folder / "1_Pooling", folder / "onnx" / "model.onnx"):
        (alone / path.name).symlink_to(path)
    return alone


@contextlib.contextmanager
def _process(command: Sequence[str], port: int, folder: Path | None = None) -> Iterator[None]:
    """A server that is run in a folder, from when it accepts connections."""
    console.print(f"  starting {Path(command[0]).name} at {port} …")
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "DO_NOT_TRACK": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServeError(f"{Path(command[0]).name} did not start.")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()
