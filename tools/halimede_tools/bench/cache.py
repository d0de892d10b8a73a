"""Texts a second that the cache and the hash embeddings answer, against what they must reach."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from halimede.cache import Cache, Disk, Entries, Expect, Memory, Redis, Tier, keys
from halimede.cache.cache import Compute
from halimede.pipeline.waiting import Flow, drive
from halimede.providers.hash import hash_embeddings, hash_space
from halimede_ops.errors import HalimedeError
from halimede_tools.bench import closed_loop, redis_server
from halimede_tools.console import console
from halimede_tools.progress import Progress

DIMS = 384
TEXTS = 20_000
BATCH = 1000
ROUNDS = 5
MIB = 1024 * 1024

BARS = {"memory": 200_000, "disk": 20_000, "redis": 20_000, "hash": 50_000}
"""Texts/s that each must reach: the median of ROUNDS."""


def bench_cache() -> None:
    """Measure, print the table.

    Raises:
        HalimedeError: one misses its bar, or redis-server cannot be started.
    """
    texts = [f"text {row}: ".encode() + b"lorem ipsum " * 15 for row in range(TEXTS)]
    with tempfile.TemporaryDirectory() as folder, redis_server.serve(Path(folder)) as url:
        with Progress("bench cache", list(BARS), ROUNDS) as progress:
            rates = _cache_rates(texts, Path(folder), url, progress)
            rates["hash"] = _hash_rates(texts, progress)
    table = Table("what", "texts/s", "lowest", "highest", "must", title=_title())
    for name, bar in BARS.items():
        figures = (statistics.median(rates[name]), min(rates[name]), max(rates[name]), bar)
        table.add_row(name, *(f"{figure:,.0f}" for figure in figures))
    Console().print(table)
    missed = [name for name, bar in BARS.items() if statistics.median(rates[name]) < bar]
    if missed:
        raise HalimedeError(f"{', '.join(missed)} missed the bar. Run it on an idle machine.")


def _cache_rates(
    texts: Sequence[bytes], folder: Path, url: str, progress: Progress
) -> dict[str, list[float]]:
    tiers: list[Tier] = [Memory(256 * MIB), Disk(folder, 256 * MIB), Redis(url)]
    return {tier.name: _hit_rates(texts, tier, progress) for tier in tiers}


def _hit_rates(texts: Sequence[bytes], tier: Tier, progress: Progress) -> list[float]:
    """Texts/s of hits in a tier: keys, lookup, arrays."""
    console.print(f"  {tier.name}: filling it")
    cache = Cache([tier])
    _read(cache, texts, _compute)
    cache.flush()
    rates = []
    for _ in range(ROUNDS):
        with progress.step(tier.name):
            rates.append(len(texts) / _read(cache, texts, _never))
    cache.close()
    return rates


def _read(cache: Cache, texts: Sequence[bytes], compute: Compute) -> float:
    """Seconds for all texts, a batch after the other."""

    def read(batch: Sequence[bytes]) -> None:
        wanted = keys(batch, space=hash_space(), precision="fp32", input_type=None, dims=DIMS)
        drive(cache.get_or_compute(wanted, compute, Expect(DIMS)))

    load = closed_loop.threads(read, _batches(texts), 1)
    load.raise_errors()
    return load.seconds


def _batches(texts: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def _compute(rows: list[int]) -> Flow[Entries]:
    yield from ()
    vectors = hash_embeddings([str(row).encode() for row in rows], DIMS)
    return Entries(vectors, np.zeros(len(rows), np.int32))


def _never(rows: list[int]) -> Flow[Entries]:
    yield from ()
    raise HalimedeError(f"{len(rows)} texts were not in the cache; the figures would be wrong.")


def _hash_rates(texts: Sequence[bytes], progress: Progress) -> list[float]:
    rates = []
    for _ in range(ROUNDS):
        with progress.step("hash"):
            load = closed_loop.threads(
                lambda batch: hash_embeddings(batch, DIMS), _batches(texts), 1
            )
        load.raise_errors()
        rates.append(len(texts) / load.seconds)
    return rates


def _title() -> str:
    return f"hits and hash embeddings: {TEXTS:,} texts of {DIMS} dims in batches of {BATCH:,}"
