"""Soak: hundreds of thousands of mixed requests to one server, every answer checked.

Requests are made beforehand and answers are compared by one product of vectors, so the load takes
little of the cores that it shares with the server. Every tenth of the run is the same work in
another order, so a difference between the first and the last is the server's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import grpc  # type: ignore[import-untyped]
import numpy as np

from halimede.providers.triton.grpc_connection import CHANNEL_OPTIONS
from halimede.providers.triton.provider import BULK_PRIORITY
from halimede_engine import batching
from halimede_ops import vectors
from halimede_ops.errors import HalimedeError, ServeError
from halimede_tools.bench import closed_loop, report
from halimede_tools.bench.peers.compare import memory_bytes
from halimede_tools.bench.peers.tables import PACKAGES
from halimede_tools.bench.report import Goal
from halimede_tools.bench.triton_request import INFER, message
from halimede_tools.build import towers
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

REPORT = report.FOLDER / "soak.md"
PARTS = 10
"""The run is measured in so many parts, for memory and drift."""
TIMEOUT_S = 60.0
SETTLE_S = 1.0
"""Without load before memory is read."""
MEMORY_RATIO = 1.05
"""Most memory at the end against after the first part."""
P99_RATIO = 1.2
"""Most p99 of single texts in the last part against the first."""

SINGLES, FEW, BULK = 1600, 80, 2
"""Of a deck: requests of one text, of up to INTERACTIVE_ROWS and of many."""
BULK_TEXTS = 100
TEXTS = 600
HALVED = 150
"""Of a deck: requests of one text in half the dimensions."""


class Inputs(TypedDict):
    """What a request holds, as `message` takes it."""

    texts: list[bytes]
    input_types: NotRequired[list[str]]
    dimensions: NotRequired[list[int]]


BAD_REQUESTS: Mapping[str, tuple[Inputs, str]] = {
    "invalid UTF-8": (
        {"texts": [b"fine", b"\xff\xfe"]},
        "InvalidText: text 1 is not valid UTF-8",
    ),
    "too large": ({"texts": [b"a" * (4 * 2**20 + 1)]}, "InvalidText: .*Split it into parts"),
    "unknown input type": (
        {"texts": [b"a"], "input_types": ["s3cret"]},
        "UnknownInputType: .*document, .*query",
    ),
    "dimensions 0": ({"texts": [b"a"], "dimensions": [0]}, r"InvalidDimensions: .*1 to \d+"),
    "dimensions above": (
        {"texts": [b"a"], "dimensions": [10**6]},
        r"InvalidDimensions: .*1 to \d+",
    ),
    "dimensions differ": (
        {"texts": [b"a", b"b"], "dimensions": [8, 9]},
        "InvalidDimensions: .*one request for each",
    ),
    "too many rows": ({"texts": [b"a"] * 129}, "<= 128"),
    "no rows": ({"texts": []}, ""),
}
"""Requests that a server must refuse as INVALID_ARGUMENT, and the pattern of its message."""
BAD_EACH, LARGE = 22, 1
"""Of a deck: requests of each of these, and of the one of 4 MB, which takes its time."""
BAD = BAD_EACH * (len(BAD_REQUESTS) - 1) + LARGE
DECK = SINGLES + HALVED + FEW + BULK + BAD

Infer = Callable[..., Awaitable[bytes]]
"""What sends a request, with a `timeout` in seconds."""


class Request(NamedTuple):
    """One request, and the answer that is right."""

    message: bytes
    expected: np.ndarray | None
    """Vectors `[texts, dims]` float32; None: it must be refused."""
    refusal: str = ""
    """Pattern of the refusal's message."""
    cosine: float = 1.0
    """Least cosine of a vector to the expected one."""


@dataclasses.dataclass
class Part(closed_loop.Load):
    """What one part of the run has shown. Its latencies are those of single texts."""

    texts: int = 0
    wrong: int = 0
    """Vectors of good answers that are not those expected."""
    memory_bytes: int = 0
    """Of the server and its processes, at the end."""

    @property
    def texts_per_s(self) -> float:
        """Texts whose vectors came."""
        return self.texts / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Latency of single texts; NaN without any."""
        return float(np.percentile(self.latencies_s or [np.nan], percent)) * 1000

    def answered(self, request: Request, answer: bytes, latency_s: float) -> None:
        """Compare the vectors of an answer with those expected."""
        if request.expected is None:
            self.errors["not refused"] += 1
            return
        if len(request.expected) == 1:
            self.latencies_s.append(latency_s)
        self.texts += len(request.expected)
        self.wrong += wrong(embedding(answer), request)

    def failed(self, request: Request, error: BaseException) -> None:
        """Count the error, unless the request had to be refused with it."""
        if not isinstance(error, grpc.RpcError):
            raise error
        refused = error.code() is grpc.StatusCode.INVALID_ARGUMENT and request.expected is None
        if not (refused and re.search(request.refusal, error.details() or "")):
            super().failed(request, error)


def soak(
    settings: Settings,
    model: str,
    precisions: Sequence[str],
    requests: int,
    concurrency: int,
    path: Path,
) -> None:
    """Serve the model's precisions, send the requests, write the report and print it.

    Raises:
        ServeError: the server could not be started.
        HalimedeError: a line of the report does not hold.
    """
    served = {served_name(model, precision): precision for precision in precisions}
    options = wheel.Options(
        http_port=18200, grpc_port=18201, metrics_port=18202, models=tuple(served)
    )
    run = settings.run(options.grpc_port)
    console.print("  starting Triton")
    with wheel.serve(settings.repository, settings.python_backend, run, options) as server:
        parts = asyncio.run(load(server, served, requests, concurrency))
    goals = judge(parts)
    command = f"halimede soak --requests {requests} --concurrency {concurrency}"
    report.publish(
        path,
        "Soak",
        report.goals(goals),
        report.origin(command, ", ".join(served), PACKAGES),
        _details(parts),
    )
    missed = [f"{goal.name} {goal.measured}, {goal.bound}" for goal in goals if not goal.holds]
    if missed:
        raise HalimedeError(f"the soak does not hold: {'; '.join(missed)}. See {path.name}.")


async def load(
    server: wheel.Server, served: Mapping[str, str], requests: int, concurrency: int
) -> list[Part]:
    """The parts of a run of so many requests to models (name → precision), after one deck that
    warms the server.

    Raises:
        ServeError: the server has ended.
    """
    async with grpc.aio.insecure_channel(server.grpc_address, CHANNEL_OPTIONS) as channel:
        infer = channel.unary_unary(INFER)
        console.print("  computing the expected vectors", markup=False)
        made = [request for name in served for request in await deck(infer, name, served[name])]
        endless = shuffled(made)
        parts = []
        with Progress("soak", ["requests"], PARTS + 1) as progress:
            for number in range(PARTS + 1):
                count = requests // PARTS if number else min(len(made), requests // PARTS)
                with progress.step("requests"):
                    part = await send(infer, itertools.islice(endless, count), concurrency)
                    await asyncio.sleep(SETTLE_S)
                if not server.is_running():
                    raise ServeError(f"Triton ended by itself under load; see {server.log}")
                part.memory_bytes = memory_bytes(server.process.pid)
                if number:
                    parts.append(part)
                    cells = " | ".join(_cells(part))
                    console.print(f"  {number} of {PARTS}: {cells}", markup=False)
    return parts


async def deck(infer: Infer, model: str, precision: str) -> list[Request]:
    """The requests of a model, in the shares that they have in the load; each text's vector is what
    the idle server gives for it alone.
    """
    texts = [text.encode() for text in corpus.check_texts(TEXTS)]
    alone = await _alone(infer, model, texts)
    least = towers.BARS[precision].invariance
    halved, half = texts[:: TEXTS // HALVED], alone.shape[1] // 2
    chance = random.Random(5)

    def request(*rows: int) -> Request:
        priority = BULK_PRIORITY if len(rows) > batching.INTERACTIVE_ROWS else 0
        sent = message(model, [texts[row] for row in rows], priority=priority)
        return Request(sent, alone[list(rows)], cosine=least)

    def random_rows(count: int) -> Request:
        return request(*chance.choices(range(TEXTS), k=count))

    return [
        *(request(place % TEXTS) for place in range(SINGLES)),
        *(random_rows(chance.randint(2, batching.INTERACTIVE_ROWS)) for _ in range(FEW)),
        *(random_rows(BULK_TEXTS) for _ in range(BULK)),
        *(
            Request(message(model, [text], dimensions=[half]), vector[None], cosine=least)
            for text, vector in zip(halved, await _alone(infer, model, halved, half), strict=True)
        ),
        *(
            Request(message(model, **inputs), None, refusal)
            for name, (inputs, refusal) in BAD_REQUESTS.items()
            for _ in range(LARGE if name == "too large" else BAD_EACH)
        ),
    ]


async def _alone(infer: Infer, model: str, texts: Sequence[bytes], dims: int = 0) -> np.ndarray:
    """Vectors `[texts, dims]` float32 of texts sent one after the other; 0: of all dimensions."""
    dimensions = [dims] if dims else ()
    sent = (message(model, [text], dimensions=dimensions) for text in texts)
    return np.concatenate([embedding(await infer(request, timeout=TIMEOUT_S)) for request in sent])


def shuffled(made: Sequence[Request]) -> Iterator[Request]:
    """The same requests again and again, each time in another order; the same in every run."""
    chance = random.Random(6)
    while True:
        yield from chance.sample(made, len(made))


async def send(infer: Infer, requests: Iterator[Request], concurrency: int) -> Part:
    """What came of the requests, so many of which are under way at a time."""
    part = Part()

    def start(request: Request) -> Awaitable[bytes]:
        return infer(request.message, timeout=TIMEOUT_S)

    await closed_loop.coroutines(start, requests, concurrency, part)
    return part


def wrong(embeddings: np.ndarray, request: Request) -> int:
    """How many of the vectors are not those expected; all when there are more or fewer."""
    assert request.expected is not None
    if embeddings.shape != request.expected.shape:
        return len(request.expected)
    near = vectors.cosine(embeddings, request.expected) >= request.cosine
    return len(near) - int(near.sum())


def embedding(answer: bytes) -> np.ndarray:
    """EMBEDDING `[texts, dims]` float32 of Triton's answer."""
    from tritonclient.grpc import service_pb2 as pb

    response = pb.ModelInferResponse.FromString(answer)
    place = [output.name for output in response.outputs].index("EMBEDDING")
    values = np.frombuffer(response.raw_output_contents[place], np.float32)
    return values.reshape(tuple(response.outputs[place].shape))


def judge(parts: Sequence[Part]) -> list[Goal]:
    """What must hold of a run, and whether it does."""
    errors = sum(part.errors.total() for part in parts)
    wrong_vectors = sum(part.wrong for part in parts)
    first, last = parts[0], parts[-1]
    memory = last.memory_bytes / first.memory_bytes
    p99 = last.percentile_ms(99) / first.percentile_ms(99)
    return [
        Goal("errors", f"{errors:,}", "at most 0", errors == 0),
        Goal("wrong vectors", f"{wrong_vectors:,}", "at most 0", wrong_vectors == 0),
        Goal(
            "memory, last tenth over first",
            f"{memory:.3f}",
            f"at most {MEMORY_RATIO:g}",
            memory <= MEMORY_RATIO,
        ),
        Goal(
            "p99, last tenth over first", f"{p99:.2f}", f"at most {P99_RATIO:g}", p99 <= P99_RATIO
        ),
    ]


def _details(parts: Sequence[Part]) -> list[str]:
    requests = sum(part.requests for part in parts)
    minutes = sum(part.seconds for part in parts) / 60
    errors: Counter[str] = sum((part.errors for part in parts), Counter())
    columns = "tenth|requests|errors|wrong vectors|p50 ms|p99 ms|texts/s|memory MB"
    lines = [
        f"{requests:,} requests in {minutes:.1f} min on one server, after a warm-up. "
        f"Of each {DECK} requests {SINGLES + HALVED} have one text, {FEW} have 2 "
        f"to {batching.INTERACTIVE_ROWS}, {BULK} have {BULK_TEXTS}, and {BAD} must be refused with "
        "their own error. Texts are empty, short, long, beyond the token limit, emoji, Chinese, "
        f"Arabic, control characters; {HALVED} ask for half the dimensions. Every "
        "vector is compared with the one that the idle server gave for the text alone. *p50*, "
        "*p99*: of single texts. *memory*: the server with its processes, what they share counted "
        f"once, {SETTLE_S:g} s after the last answer. The load runs on the same cores.",
        "",
        *report.table(
            columns.split("|"), [[number, *_cells(part)] for number, part in enumerate(parts, 1)]
        ),
    ]
    if errors:
        lines += ["", "Errors: " + ", ".join(f"{name} {n:,}" for name, n in errors.items()) + "."]
    return lines


def _cells(part: Part) -> list[str]:
    return [
        f"{part.requests:,}",
        f"{part.errors.total():,}",
        f"{part.wrong:,}",
        f"{part.percentile_ms(50):.0f}",
        f"{part.percentile_ms(99):.0f}",
        f"{part.texts_per_s:.0f}",
        f"{part.memory_bytes / 1e6:.0f}",
    ]
