"""One text alone: what the client adds to the model in process, and to a bare stub over gRPC."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from halimede import Embedder
from halimede_repository import configs
from halimede_tools.bench import report, torch_worker
from halimede_tools.build.repository import served_name
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.serve.ports import free_ports
from halimede_tools.settings import Settings

TOKENS = (4, 15, 44, 128)
CALLS = 12
"""Calls of one text in a row; the first two are not counted."""
PAUSE_S = 0.2
"""Torch's threads spin for a while after a call."""
MAX_ADDED_MS = 0.3
MIN_RATIO = 5.5
"""How many times as fast as sentence-transformers INT8 in process must be, on FEW_TOKENS."""
FEW_TOKENS = (4, 15)
DIRECT, IN_PROCESS = "tokenizer + session", "Embedder in process"
STUB, OVER_GRPC = "bare gRPC stub", "Embedder over gRPC"
TORCH = "sentence-transformers"
PAIRS = ((DIRECT, IN_PROCESS), (STUB, OVER_GRPC))
"""What is compared."""
PACKAGES = ("onnxruntime-openvino", "grpcio", "sentence-transformers", "torch")

Call = Callable[[str], object]
Seconds = dict[tuple[str, int], list[float]]
"""Contestant and tokens → seconds of each call."""


def lone(settings: Settings, model: str, precisions: Sequence[str], rounds: int) -> Path:
    """Measure, print the table and write the report. Return the report's path."""
    seconds: dict[str, Seconds] = {}
    with Progress("bench lone", list(precisions), 1) as progress, ExitStack() as opened:
        console.print("  opening sentence-transformers …")
        source = settings.models / model / "source"
        torch = opened.enter_context(
            torch_worker.opened("SentenceTransformer", source, "encode", CALLS)
        )
        for precision in precisions:
            with progress.step(precision), ExitStack() as running:
                name = served_name(model, precision)
                callers = running.enter_context(_contestants(settings, name, precision))
                seconds[precision] = _measure(callers, torch, _texts(settings, name), rounds)
    rows = [row for precision, measured in seconds.items() for row in _rows(precision, measured)]
    columns = ["precision", "way", *(f"{tokens} tokens" for tokens in TOKENS)]
    return report.publish(
        report.FOLDER / "lone.md",
        "One text alone",
        [*report.goals(_goals(seconds)), "", *report.table(columns, rows)],
        report.origin("halimede bench lone", model, PACKAGES),
        [
            f"Milliseconds, p50 of {rounds} rounds of {CALLS - 2} calls. In each round every way "
            "has its turn with every text; the two over gRPC alternate call by call. The server "
            "runs on the same cores. The bare stub's request is made, sent, and its vector read.",
        ],
    )


def _measure(
    callers: Mapping[str, Call], torch: Callable[[str], list[float]], texts: Sequence[str],
    rounds: int,
) -> Seconds:  # fmt: skip
    seconds: Seconds = {}
    for number in range(rounds + 1):
        for tokens, text in zip(TOKENS, texts, strict=True):
            taken = {TORCH: torch(text)}
            time.sleep(PAUSE_S)
            for names in _turns(number):
                taken |= _timed(callers, names, text)
            if number:  # the first round warms
                for name, measured in taken.items():
                    seconds.setdefault((name, tokens), []).extend(measured[2:])
    return seconds


def _turns(number: int) -> list[Sequence[str]]:
    """The ways in the order of their turns in a round; those of one turn alternate call by call.

    The two over gRPC use one session. In process each has its own, which would be cold after a call
    of the other.
    """
    order = (-1) ** number
    return [*((name,) for name in PAIRS[0][::order]), PAIRS[1][::order]]


def _timed(callers: Mapping[str, Call], names: Sequence[str], text: str) -> dict[str, list[float]]:
    """Seconds of calls of these ways in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(CALLS):
        for name in names:
            began = time.perf_counter()
            callers[name](text)
            seconds[name].append(time.perf_counter() - began)
    return seconds


@contextmanager
def _contestants(settings: Settings, name: str, precision: str) -> Iterator[dict[str, Call]]:
    """The four ways, with the model in this process and on a server."""
    http, grpc_port, metrics = free_ports(3)
    options = wheel.Options(
        http_port=http, grpc_port=grpc_port, metrics_port=metrics, models=(name,)
    )
    local = {"provider": "onnx", "model_id": name, "path": str(settings.repository)}
    with tempfile.TemporaryDirectory(dir=settings.home) as run, ExitStack() as opened:
        server = opened.enter_context(
            wheel.serve(settings.repository, settings.python_backend, Path(run), options)
        )
        in_process = opened.enter_context(Embedder(config={"models": {"local": local}}))
        over_grpc = opened.enter_context(Embedder(server.grpc_address, name))
        yield {
            DIRECT: _direct(settings.repository, name, precision),
            IN_PROCESS: in_process.embed,
            STUB: _stub(server.grpc_address, name),
            OVER_GRPC: over_grpc.embed,
        }


def _direct(repository: Path, name: str, precision: str) -> Call:
    """Tokenize, run, pool and normalise in the caller's thread, with all threads for one run."""
    from halimede_engine import cores, engine, session
    from halimede_ops import spec, text

    version = configs.read(repository, name)
    facts = spec.load(version.folder)
    opened, _ = session.open_session(
        version.steps[f"{name}-onnx"] / session.FILE_NAME,
        [session.Accelerator("openvino")],
        cores.available(),
        1,
        facts.max_tokens,
        tight_padding=precision in session.TIGHT_PADDING,
    )
    tokenizer = text.load(version.steps[f"{facts.name}-tokenizer"], facts)
    alone = engine.Engine(opened, engine.text_rows(tokenizer), facts)
    return lambda value: alone.embed(tokenizer.prompted([value], [None]))


def _stub(address: str, name: str) -> Call:
    import grpc  # type: ignore[import-untyped]
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

    stub: Any = GRPCInferenceServiceStub(grpc.insecure_channel(address))

    def embed(value: str) -> np.ndarray:
        request = messages.ModelInferRequest(model_name=name)
        request.inputs.add(name="TEXT", datatype="BYTES", shape=[1, 1])
        encoded = value.encode()
        request.raw_input_contents.append(len(encoded).to_bytes(4, "little") + encoded)
        request.outputs.add(name="EMBEDDING")
        request.outputs.add(name="TOKENS")
        answer = stub.ModelInfer(request, timeout=30)
        return np.frombuffer(answer.raw_output_contents[0], "<f4")

    return embed


def _texts(settings: Settings, name: str) -> list[str]:
    """A text of each number of tokens, special tokens included."""
    from halimede_ops import spec, text

    version = configs.read(settings.repository, name)
    facts = spec.load(version.folder)
    tokenizer = text.load(version.steps[f"{facts.name}-tokenizer"], facts)
    texts = []
    for tokens in TOKENS:
        value = " ".join(["word"] * (tokens - 2))
        assert tokenizer.encode_prompted([value])[0].total == tokens
        texts.append(value)
    return texts


def _p50_ms(seconds: Seconds, way: str, tokens: int) -> float:
    return 1000 * statistics.median(seconds[way, tokens])


def _rows(precision: str, seconds: Seconds) -> Iterator[list[str]]:
    for way in (DIRECT, IN_PROCESS, STUB, OVER_GRPC, TORCH):
        cells = [f"{_p50_ms(seconds, way, tokens):.2f}" for tokens in TOKENS]
        yield [precision, way, *cells]


def _goals(seconds: Mapping[str, Seconds]) -> Iterator[report.Goal]:
    for precision, measured in seconds.items():
        for base, way in PAIRS:
            added = [
                _p50_ms(measured, way, tokens) - _p50_ms(measured, base, tokens)
                for tokens in TOKENS
            ]
            yield report.Goal(
                f"{precision}: {way} above {base}",
                " / ".join(f"{ms:.2f}" for ms in added) + " ms",
                f"at most {MAX_ADDED_MS} ms",
                max(added) <= MAX_ADDED_MS,
            )
    if "int8" in seconds:
        ratios = [
            _p50_ms(seconds["int8"], TORCH, tokens) / _p50_ms(seconds["int8"], IN_PROCESS, tokens)
            for tokens in FEW_TOKENS
        ]
        yield report.Goal(
            f"int8: {TORCH} over {IN_PROCESS}, {FEW_TOKENS[0]} and {FEW_TOKENS[1]} tokens",
            " / ".join(f"{ratio:.1f}" for ratio in ratios),
            f"at least {MIN_RATIO}",
            min(ratios) >= MIN_RATIO,
        )
