"""What one server does, by the length of its texts and by its cores, and how a client spreads over
two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np

from halimede import AsyncEmbedder
from halimede_ops import spec, text
from halimede_repository import configs
from halimede_tools.bench import machine
from halimede_tools.bench.peers import runner
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.build.steps import console
from halimede_tools.serve import wheel
from halimede_tools.serve.ports import free_ports
from halimede_tools.settings import ROOT, Settings

CONCURRENCY = 32
TEXTS = {16: 1000, 64: 500, 256: 200}
"""Tokens of a text → how many of them are sent."""
SPREAD_TEXTS = 600
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton")


class Load(NamedTuple):
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
    loads = {}
    spreads = {}
    for precision in precisions:
        name = served_name(model, precision)
        with _served(settings, name) as whole:
            for tokens, texts in _texts(settings, name).items():
                loads[precision, tokens] = _load(whole, name, texts, rounds)
            spreads[precision] = [_spread("one, all cores", [whole], name, rounds)]
        cores = sorted(os.sched_getaffinity(0))
        with contextlib.ExitStack() as stack:
            single = [stack.enter_context(_served(settings, name, core)) for core in cores]
            spreads[precision].append(_spread("one, one core", single[:1], name, rounds))
            spreads[precision].append(_spread("one a core", single, name, rounds))
    report = ROOT / "docs" / "benchmarks" / "scaling.md"
    report.write_text(_report(model, loads, spreads, rounds))
    console.print(report.read_text(), markup=False)
    return report


@contextlib.contextmanager
def _served(settings: Settings, name: str, core: int | None = None) -> Iterator[wheel.Server]:
    """A server of one model, on one core or on all."""
    http, grpc, metrics = free_ports(3)
    options = wheel.Options(http_port=http, grpc_port=grpc, metrics_port=metrics, models=(name,))
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as run, contextlib.ExitStack() as stack:
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
    own, *told = [its.total for its in tokenizer.encode(["", *words], [None] * (1 + len(words)))]
    short = [word for word, total in zip(words, told, strict=True) if total == own + 1]
    chance = random.Random(1)
    return {
        tokens: [" ".join(chance.choices(short, k=tokens - own)) for _ in range(count)]
        for tokens, count in TEXTS.items()
    }


def _load(server: wheel.Server, name: str, texts: Sequence[str], rounds: int) -> Load:
    """Medians over the rounds, after one that warms."""
    runs = [
        runner.load(lambda _: None, texts, CONCURRENCY, server.grpc_address, name)
        for _ in range(rounds + 1)
    ][1:]
    quantiles = [np.percentile(run["latencies"], (50, 99)) * 1000 for run in runs]
    return Load(
        len(texts) / statistics.median(run["seconds"] for run in runs),
        statistics.median(float(p50) for p50, _ in quantiles),
        statistics.median(float(p99) for _, p99 in quantiles),
    )


def _spread(told: str, servers: Sequence[wheel.Server], name: str, rounds: int) -> Spread:
    """Mixed texts, one a call, by halimede's client with every address."""
    texts = corpus.mixed_texts(SPREAD_TEXTS)
    before = [_answered(server, name) for server in servers]
    seconds = asyncio.run(_embedded(servers, name, texts, rounds))
    answered = [_answered(server, name) - one for server, one in zip(servers, before, strict=True)]
    return Spread(told, len(texts) / seconds, [one / sum(answered) for one in answered])


async def _embedded(
    servers: Sequence[wheel.Server], name: str, texts: Sequence[str], rounds: int
) -> float:
    """Median seconds for all texts, CONCURRENCY at a time, after a round that warms."""
    model = {"provider": "triton", "model_id": name, "url": [s.grpc_address for s in servers]}
    took = []

    async def caller(embedder: AsyncEmbedder, waiting: Iterator[str]) -> None:
        for one in waiting:
            await embedder.embed(one)

    async with AsyncEmbedder(config={"models": {"server": model}}) as embedder:
        for _ in range(rounds + 1):
            waiting = iter(texts)
            began = time.perf_counter()
            await asyncio.gather(*[caller(embedder, waiting) for _ in range(CONCURRENCY)])
            took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _answered(server: wheel.Server, name: str) -> int:
    """Requests that a server has answered."""
    with urlopen(f"http://{server.http_address}/v2/models/{name}/stats") as told:
        [stats] = json.load(told)["model_stats"]
    return int(stats["inference_stats"]["success"]["count"])


def _report(
    model: str,
    loads: dict[tuple[str, int], Load],
    spreads: dict[str, list[Spread]],
    rounds: int,
) -> str:
    lines = [
        "# Scaling",
        "",
        machine.taken("python -m halimede_tools bench-scaling", model, PACKAGES),
        "",
        f"Medians of {rounds} rounds after one that warms; {CONCURRENCY} texts at a time, one a "
        "request, over gRPC. What sends them runs on the same cores.",
        "",
        "## One server, by the length of the texts",
        "",
        "| precision | tokens a text | texts/s | tokens/s | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {precision} | {tokens} | {load.texts_per_s:.0f} | {load.texts_per_s * tokens:.0f} "
        f"| {load.p50_ms:.0f} | {load.p99_ms:.0f} |"
        for (precision, tokens), load in loads.items()
    ]
    lines += [
        "",
        "## Servers beside each other",
        "",
        "Mixed texts by halimede's client, given every address; each server's share of them.",
        "",
        "| precision | servers | texts/s | shares |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {precision} | {spread.servers} | {spread.texts_per_s:.0f} "
        f"| {', '.join(f'{share:.1%}' for share in spread.shares)} |"
        for precision, found in spreads.items()
        for spread in found
    ]
    return "\n".join(lines) + "\n"
