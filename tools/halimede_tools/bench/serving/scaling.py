"""The rate of a server by the length of its texts and by its cores, and of several servers that
share one client's texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np

from halimede import AsyncEmbedder
from halimede_ops import spec, text
from halimede_repository import configs
from halimede_tools.bench import closed_loop, report, triton_request
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.serve.ports import free_ports
from halimede_tools.settings import Settings

CONCURRENCY = 32
TEXTS = {16: 1000, 64: 500, 256: 200}
"""Tokens of a text → how many of them are sent."""
SPREAD_TEXTS = 600
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton")


WHOLE, CORE, CORES = "one, all cores", "one, one core", "one a core"
"""How many servers, and on which cores."""


class Rates(NamedTuple):
    """What a server did under one load."""

    texts_per_s: float
    p50_ms: float
    p99_ms: float


class Spread(NamedTuple):
    """What servers did together: texts/s of all, and the share of each."""

    servers: str
    texts_per_s: float
    shares: list[float]


def bench_scaling(settings: Settings, model: str, precisions: Sequence[str], rounds: int) -> Path:
    """Measure, print and write the report; its path."""
    loads: dict[tuple[str, int], Rates] = {}
    spreads: dict[str, list[Spread]] = {}
    kinds = [f"{tokens} tokens a text" for tokens in TEXTS] + [WHOLE, CORE, CORES]
    steps = [f"{precision}, {kind}" for precision in precisions for kind in kinds]
    with Progress("bench scaling", steps, rounds + 1) as progress:
        for precision in precisions:
            name = served_name(model, precision)
            with _served(settings, name) as whole:
                for tokens, texts in _texts(settings, name).items():
                    step = f"{precision}, {tokens} tokens a text"
                    loads[precision, tokens] = _load(whole, name, texts, rounds, progress, step)
                spreads[precision] = [_spread(precision, WHOLE, [whole], name, rounds, progress)]
            cores = sorted(os.sched_getaffinity(0))
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(_served(settings, name, core)) for core in cores]
                for kind, chosen in ((CORE, servers[:1]), (CORES, servers)):
                    spread = _spread(precision, kind, chosen, name, rounds, progress)
                    spreads[precision].append(spread)
    return report.publish(
        report.FOLDER / "scaling.md",
        "Scaling",
        _conclusion(spreads),
        report.origin("halimede bench scaling", model, PACKAGES),
        _details(loads, spreads, rounds),
    )


@contextlib.contextmanager
def _served(settings: Settings, name: str, core: int | None = None) -> Iterator[wheel.Server]:
    """A server of one model, on one core or on all."""
    http, grpc, metrics = free_ports(3)
    options = wheel.Options(http_port=http, grpc_port=grpc, metrics_port=metrics, models=(name,))
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as run, contextlib.ExitStack() as stack:
        console.print(f"  {name}: starting Triton{'' if core is None else f' on core {core}'}")
        try:
            os.sched_setaffinity(0, cores if core is None else {core})  # a child has its parent's
            server = stack.enter_context(
                wheel.serve(settings.repository, settings.python_backend, Path(run), options)
            )
        finally:
            os.sched_setaffinity(0, cores)
        yield server


def _texts(settings: Settings, name: str) -> dict[int, list[str]]:
    """Texts of words that are one token each, by their tokens."""
    steps = configs.read(settings.repository, name).steps
    [folder] = [folder for step, folder in steps.items() if step.endswith("-tokenizer")]
    tokenizer = text.load(folder, spec.load(folder))
    words = sorted({word for sentence in corpus.SENTENCES for word in sentence.split()})
    own, *totals = [row.total for row in tokenizer.encode(["", *words], [None] * (1 + len(words)))]
    short = [word for word, total in zip(words, totals, strict=True) if total == own + 1]
    chance = random.Random(1)
    return {
        tokens: [" ".join(chance.choices(short, k=tokens - own)) for _ in range(count)]
        for tokens, count in TEXTS.items()
    }


def _load(
    server: wheel.Server,
    name: str,
    texts: Sequence[str],
    rounds: int,
    progress: Progress,
    step: str,
) -> Rates:
    """Medians over the rounds, after one that warms."""
    loads = []
    for _ in range(rounds + 1):
        with progress.step(step):
            loads.append(triton_request.send_singly(server.grpc_address, name, texts, CONCURRENCY))
    quantiles = [np.percentile(load.latencies_s, (50, 99)) * 1000 for load in loads[1:]]
    return Rates(
        len(texts) / statistics.median(load.seconds for load in loads[1:]),
        statistics.median(float(p50) for p50, _ in quantiles),
        statistics.median(float(p99) for _, p99 in quantiles),
    )


def _spread(
    precision: str,
    kind: str,
    servers: Sequence[wheel.Server],
    name: str,
    rounds: int,
    progress: Progress,
) -> Spread:
    """Mixed texts, one a call, by halimede's client with every address; the median of the rounds,
    after one that warms.
    """
    texts = corpus.mixed_texts(SPREAD_TEXTS)
    before = [_answered(server, name) for server in servers]
    model = {"provider": "triton", "model_id": name, "url": [s.grpc_address for s in servers]}

    async def durations_s() -> list[float]:
        measured = []
        async with AsyncEmbedder(config={"models": {"server": model}}) as embedder:
            for _ in range(rounds + 1):
                with progress.step(f"{precision}, {kind}"):
                    load = await closed_loop.coroutines(embedder.embed, texts, CONCURRENCY)
                load.raise_errors()
                measured.append(load.seconds)
        return measured

    texts_per_s = len(texts) / statistics.median(asyncio.run(durations_s())[1:])
    counts = [
        _answered(server, name) - count for server, count in zip(servers, before, strict=True)
    ]
    return Spread(kind, texts_per_s, [count / sum(counts) for count in counts])


def _answered(server: wheel.Server, name: str) -> int:
    """Requests that a server has answered."""
    with urlopen(f"http://{server.http_address}/v2/models/{name}/stats") as answer:
        [stats] = json.load(answer)["model_stats"]
    return int(stats["inference_stats"]["success"]["count"])


def _conclusion(spreads: dict[str, list[Spread]]) -> list[str]:
    """What a server a core does, against one server on all of them."""
    rows = []
    for precision, measured in spreads.items():
        rates = {spread.servers: spread.texts_per_s for spread in measured}
        rows.append(
            (
                precision,
                f"{rates[WHOLE]:.0f}",
                f"{rates[CORES]:.0f}",
                f"{rates[CORES] / rates[WHOLE]:.2f}",
            )
        )
    columns = f"precision|{WHOLE}: texts/s|{CORES}: texts/s|×"
    return report.table(columns.split("|"), rows)


def _details(
    loads: dict[tuple[str, int], Rates], spreads: dict[str, list[Spread]], rounds: int
) -> list[str]:
    return [
        f"Medians of {rounds} rounds after one that warms; {CONCURRENCY} texts at a time, one a "
        "request, over gRPC. What sends them runs on the same cores.",
        "",
        "## One server, by the length of the texts",
        "",
        *report.table(
            ["precision", "tokens a text", "texts/s", "tokens/s", "p50 ms", "p99 ms"],
            [
                (
                    precision,
                    tokens,
                    f"{load.texts_per_s:.0f}",
                    f"{load.texts_per_s * tokens:.0f}",
                    f"{load.p50_ms:.0f}",
                    f"{load.p99_ms:.0f}",
                )
                for (precision, tokens), load in loads.items()
            ],
        ),
        "",
        "## Servers beside each other",
        "",
        "Mixed texts by halimede's client, given every address; each server's share of them.",
        "",
        *report.table(
            ["precision", "servers", "texts/s", "shares"],
            [
                (
                    precision,
                    spread.servers,
                    f"{spread.texts_per_s:.0f}",
                    ", ".join(f"{share:.1%}" for share in spread.shares),
                )
                for precision, measured in spreads.items()
                for spread in measured
            ],
        ),
    ]
