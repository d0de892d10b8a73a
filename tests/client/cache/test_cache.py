"""The cache, with a real Redis and real files."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import multiprocessing.synchronize
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, require
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from redis import Redis as Client

from halimede.cache import (
    Cache,
    Disk,
    Entries,
    Expect,
    Memory,
    Redis,
    Tier,
    disk,
    guarded,
    keys,
)
from halimede.cache.entries import is_intact, pack, unpack
from halimede.cache.redis import TEMPERATURES
from halimede.inputs.content import Pair, TextPair
from halimede.pipeline.waiting import Flow, Wait, drive_async, shared_result
from halimede.providers.base import ragged
from halimede.results import IMAGE
from halimede_ops.errors import HalimedeError, InvalidInput, MissingExtra
from halimede_tools.bench import redis_server
from halimede_tools.serve.ports import free_ports

DIMS = 384
EXPECT = Expect(DIMS)
MIB = 1024 * 1024
SECRET = b"the patient's name is Ada"
PATIENCE_S = 120.0
"""A call that waits longer hangs."""


def wanted(
    texts: Sequence[bytes], space: str = "c472f57cf65a4593", dims: int = DIMS
) -> list[bytes]:
    return keys(texts, space=space, precision="fp32", input_type=None, dims=dims)


def vector(text: bytes, dims: int = DIMS) -> np.ndarray:
    """A vector that only this text has."""
    return np.random.default_rng(list(text)).standard_normal(dims).astype(np.float32)


class Latch:
    """What flows wait for until it is set."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()

    def set(self) -> None:
        self._future.set_result(None)

    def wait(self) -> Flow[None]:
        yield from shared_result(self._future)


def nothing() -> Flow[None]:
    """A flow that does not wait."""
    yield from ()


class Engine:
    """Computes the vectors of texts and remembers which."""

    def __init__(self, texts: Sequence[bytes], dims: int = DIMS) -> None:
        self.texts = texts
        self.dims = dims
        self.computed: list[bytes] = []

    def compute(self, rows: list[int]) -> Flow[Entries]:
        self.computed += [self.texts[row] for row in rows]
        yield Wait((), time.monotonic())
        return self.entries(rows)

    def entries(self, rows: Sequence[int]) -> Entries:
        vectors = np.stack([vector(self.texts[row], self.dims) for row in rows])
        return Entries(vectors, np.array([len(self.texts[row]) for row in rows], np.int32))


async def ask(
    cache: Cache, texts: Sequence[bytes], expect: Expect = EXPECT
) -> tuple[list[bytes], np.ndarray]:
    """The texts that were computed and the hits; every vector is checked to be its text's own."""
    engine = Engine(texts, expect.dims)
    call = cache.get_or_compute(wanted(texts, dims=expect.dims), engine.compute, expect)
    entries, hits = await asyncio.wait_for(drive_async(call), PATIENCE_S)
    expected = engine.entries(range(len(texts)))
    np.testing.assert_array_equal(entries.vectors, expected.vectors)
    np.testing.assert_array_equal(entries.tokens, expected.tokens)
    assert entries.vectors.dtype == np.float32 and entries.tokens.dtype == np.int32
    return engine.computed, hits


def some(count: int, name: str = "text") -> list[bytes]:
    return [f"{name} {row}".encode() for row in range(count)]


def patient_disk(folder: Path, max_bytes: int = 64 * MIB, timeout_s: float = PATIENCE_S) -> Disk:
    """A tier that a busy machine does not make fail."""
    return Disk(folder, max_bytes, timeout_s=timeout_s)


def patient_redis(url: str, **options: Any) -> Redis:
    """A tier that a busy machine does not make fail."""
    return Redis(url, timeout_s=PATIENCE_S, **options)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something that happens in the background has happened."""
    for _ in range(int(PATIENCE_S / 0.02)):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")


def tier_stats(cache: Cache, name: str) -> dict:
    return cache.stats()["tiers"][name]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require("redis-server")
    with redis_server.serve(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    Client.from_url(server).flushall()
    return server


@pytest.fixture(params=["memory", "disk", "redis"])
def make_tier(request: pytest.FixtureRequest, tmp_path: Path, url: str) -> Callable[[], Tier]:
    """Makes a tier of each kind; the same contents each time where it outlives its object."""
    return {
        "memory": lambda: Memory(64 * MIB),
        "disk": lambda: patient_disk(tmp_path / "cache"),
        "redis": lambda: patient_redis(url),
    }[request.param]


class Slow:
    """A tier whose reads or writes wait until they are let go."""

    name = "slow"
    timeout_s = PATIENCE_S

    def __init__(self, reads: bool = False, writes: bool = False) -> None:
        self.reads, self.writes = threading.Event(), threading.Event()
        if not reads:
            self.reads.set()
        if not writes:
            self.writes.set()
        self.held: dict[bytes, bytes] = {}

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.reads.wait()
        return [self.held.get(key) for key in keys]

    def put(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        self.writes.wait()
        self.held.update(items)

    def stats(self) -> dict[str, Any]:
        return {"size_bytes": None}

    def clear(self) -> None:
        self.held.clear()

    def close(self) -> None: ...


# --- keys and values


fields = st.tuples(
    st.text(max_size=4), st.text(max_size=4), st.none() | st.text(max_size=4), st.integers(1, 20)
)
missing_or_bytes = st.none() | st.binary(max_size=3)
of_a_kind = (
    st.tuples(st.sampled_from(["text", "image"]), st.binary(max_size=6))
    | st.tuples(st.just("pair"), st.builds(Pair, missing_or_bytes, missing_or_bytes))
)  # fmt: skip


@given(fields, of_a_kind, fields, of_a_kind)
@example(("ab", "c", None, 1), ("text", b""), ("a", "bc", None, 1), ("text", b""))
@example(("a", "b", None, 1), ("text", b""), ("a", "b", "", 1), ("text", b""))
@example(("a", "b", "c", 1), ("text", b"2x"), ("a", "b", "c", 12), ("text", b"x"))
@example(("a", "b", None, 1), ("text", b"x"), ("a", "b", None, 1), ("image", b"x"))
@example(
    ("", "", None, 1), ("pair", Pair(b"xy", b"")), ("", "", None, 1), ("pair", Pair(b"x", b"y"))
)
def test_keys_are_equal_only_when_everything_is(a, item_a, b, item_b) -> None:
    """Kind, space, precision, input type, dims and item each change the key; nothing runs
    together: a text never answers for an image, nor one half of a pair for the other.
    """

    def key(fields: tuple, item: tuple) -> bytes:
        space, precision, input_type, dims = fields
        facts = dict(space=space, precision=precision, input_type=input_type, dims=dims)
        return keys([item[1]], kind=item[0], **facts)[0]

    assert (key(a, item_a) == key(b, item_b)) == ((a, item_a) == (b, item_b))


def test_keys_stay_the_same_from_version_to_version() -> None:
    """A key is what it was when the tiers were filled, 20 bytes, and holds no text."""
    key = keys([b"hello"], space="s", precision="fp32", input_type="query", dims=384)[0]
    assert key.hex() == "b5100160cfea5ac6a7db000101c763e4f1067c55"


def test_outputs_have_keys_of_their_own() -> None:
    """A text's vector, its scores, its sparse weights and its multi-vectors, and a text pair."""
    facts: dict[str, Any] = dict(space="s", precision="fp32", input_type=None, dims=384)
    made = [
        keys([item], kind=kind, output=output, **facts)[0]
        for kind, item in (("text", b"ab"), ("text_pair", TextPair(b"a", b"b")))
        for output in ("vector", "scores", "sparse", "multi")
    ]
    made += keys([TextPair(b"ab", b""), TextPair(b"", b"ab")], kind="text_pair", **facts)
    assert len(set(made)) == len(made)


entry = st.integers(1, 40).flatmap(
    lambda dims: st.tuples(
        hnp.arrays(np.float32, (3, dims), elements=st.floats(width=32)),
        hnp.arrays(np.int32, 3),
    )
)


@given(entry)
def test_values_give_back_every_bit(arrays) -> None:
    """What is packed is unpacked bit by bit, NaN and minus zero included."""
    entries, names = Entries(*arrays), [b"a", b"b", b"c"]
    expect = Expect(entries.vectors.shape[1])
    values = pack(names, entries)
    assert all(map(is_intact, names, values, [expect] * 3))
    again = unpack(values, expect)
    assert again.vectors.tobytes() == entries.vectors.tobytes()
    np.testing.assert_array_equal(again.tokens, entries.tokens)
    np.testing.assert_array_equal(again.images, np.zeros(3, IMAGE))


matrices = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)),
    max_size=4,
)


@given(matrices)
def test_values_give_back_matrices_of_any_shape(given: list[np.ndarray]) -> None:
    """Rows of different numbers of vectors, or of none, bit by bit."""
    names = [b"%d" % place for place in range(len(given))]
    values = pack(names, Entries(ragged(given), np.arange(len(given), dtype=np.int32)))
    assert all(map(is_intact, names, values, [Expect(None)] * len(given)))
    again = unpack(values, Expect(None))
    assert [matrix.shape for matrix in again.vectors] == [matrix.shape for matrix in given]
    assert [matrix.tobytes() for matrix in again.vectors] == [one.tobytes() for one in given]
    assert again.tokens.tolist() == list(range(len(given)))


def test_values_hold_what_is_told_of_an_image() -> None:
    """Width, height and format come back with the vector."""
    images = np.array([(640, 480, b"JPEG"), (1, 2**31 - 1, b"WEBP")], IMAGE)
    entries = Entries(np.ones((2, 5), np.float32), np.full(2, -1, np.int32), images)
    np.testing.assert_array_equal(unpack(pack([b"a", b"b"], entries), Expect(5)).images, images)


VALUE = pack([b"key"], Entries(np.ones((1, 5), np.float32), np.zeros(1, np.int32)))[0]


@given(st.integers(0, len(VALUE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_found(at: int, change: int) -> None:
    """No byte of a value can change unnoticed."""
    changed = bytearray(VALUE)
    changed[at] ^= change
    assert not is_intact(b"key", bytes(changed), Expect(5))


@given(st.binary(max_size=80) | st.integers(0, len(VALUE) - 1).map(lambda end: VALUE[:end]))
def test_foreign_and_truncated_values_are_found(value: bytes) -> None:
    """Any other bytes are no value of ours."""
    assert not is_intact(b"key", value, Expect(5))


def test_a_value_belongs_to_its_key_and_dims() -> None:
    """A whole value under another key, of other dims, or that is no bytes, is not intact."""
    assert is_intact(b"key", VALUE, Expect(5))
    assert not is_intact(b"other", VALUE, Expect(5))
    assert not is_intact(b"key", VALUE, Expect(6))
    assert not is_intact(b"key", VALUE.decode("latin-1"), Expect(5))


# --- every tier


def test_a_tier_holds_what_it_was_given(make_tier: Callable[[], Tier]) -> None:
    """Values come back in the order of the keys; a second put replaces; clear forgets."""

    async def flow() -> None:
        tier = make_tier()
        tier.put([(b"a", b"1"), (b"b", bytes(range(256)))])
        tier.put([(b"a", b"2")])
        assert list(tier.get([b"b", b"x", b"a", b"a"])) == [
            bytes(range(256)),
            None,
            b"2",
            b"2",
        ]
        tier.clear()
        assert list(tier.get([b"a", b"b"])) == [None, None]
        tier.close()
        tier.close()

    asyncio.run(flow())


def test_hits_are_bit_equal_and_misses_computed_once(make_tier: Callable[[], Tier]) -> None:
    """Each distinct missing text is computed once and found later, also by another cache."""

    async def flow() -> None:
        cache = Cache([make_tier()])
        computed, hits = await ask(cache, [*some(700), *some(5), b"", b""])
        assert computed == [*some(700), b""]
        assert not hits.any()
        computed, hits = await ask(cache, [b"new", *some(700), b"new"])
        assert computed == [b"new"]
        assert hits.tolist() == [False, *[True] * 700, False]
        name = next(iter(cache.stats()["tiers"]))
        assert tier_stats(cache, name)["hits"] == 700
        await asyncio.to_thread(cache.close)
        if name != "memory":  # what was queued is written before the cache is closed
            cache = Cache([make_tier()])
            computed, hits = await ask(cache, some(700))
            assert not computed and hits.all()
            assert tier_stats(cache, name)["hit_rate"] == 1.0
            await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_matrices_are_kept_in_every_tier(make_tier: Callable[[], Tier]) -> None:
    """Of any length: what is found is what was computed, and NaN is not kept."""
    lengths = [0, 1, 7, 300, 40, 2]
    given = [np.full((length, 128), length, np.float32) for length in lengths]
    given[2][3, 3] = np.nan
    expect, names = Expect(None), some(len(given))
    computed: list[list[int]] = []

    def compute(rows: list[int]) -> Flow[Entries]:
        computed.append(rows)
        yield from nothing()
        return Entries(ragged([given[row] for row in rows]), np.array(rows, np.int32))

    async def flow() -> None:
        cache = Cache([make_tier()])
        for _ in range(2):
            entries, hits = await drive_async(cache.get_or_compute(wanted(names), compute, expect))
            for matrix, expected in zip(entries.vectors, given, strict=True):
                np.testing.assert_array_equal(matrix, expected)
            assert entries.tokens.tolist() == list(range(len(given)))
        assert hits.tolist() == [True, True, False, True, True, True]
        assert computed == [[0, 1, 2, 3, 4, 5], [2]]
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_age_is_bounded_in_every_tier(make_tier: Callable[[], Tier]) -> None:
    """A vector older than `max_age_s` is computed anew and then young again."""

    async def flow() -> None:
        cache = Cache([make_tier()])
        await ask(cache, some(3))
        await asyncio.to_thread(cache.flush)
        await asyncio.sleep(0.05)
        assert (await ask(cache, some(3), Expect(DIMS, max_age_s=600.0)))[0] == []
        assert (await ask(cache, some(3), Expect(DIMS, max_age_s=0.04)))[0] == some(3)
        assert (await ask(cache, some(3), Expect(DIMS, max_age_s=600.0)))[0] == []
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_clear_forgets_everything(make_tier: Callable[[], Tier]) -> None:
    """After `clear` every text is computed again, what was only queued included."""

    async def flow() -> None:
        cache = Cache([make_tier()])
        await ask(cache, some(2000))
        await asyncio.to_thread(cache.clear)
        assert (await ask(cache, some(2000)))[0] == some(2000)
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_what_is_not_finite_is_not_kept(make_tier: Callable[[], Tier]) -> None:
    """A NaN is given back as it was computed, and computed again the next time."""

    def compute(rows: list[int]) -> Flow[Entries]:
        vectors = np.ones((len(rows), DIMS), np.float32)
        vectors[0, 7] = np.nan
        yield from nothing()
        return Entries(vectors, np.zeros(len(rows), np.int32))

    async def flow() -> None:
        cache = Cache([make_tier()])
        entries, _ = await drive_async(cache.get_or_compute(wanted(some(2)), compute, EXPECT))
        assert np.isnan(entries.vectors[0, 7])
        _, hits = await drive_async(cache.get_or_compute(wanted(some(2)), compute, EXPECT))
        assert hits.tolist() == [False, True]
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


# --- the cache


@pytest.mark.parametrize("tiers", [[], [Memory(MIB)]])
def test_nothing_is_asked_for_nothing(tiers: list[Tier]) -> None:
    """No keys: no rows, no computation."""

    async def flow() -> None:
        entries, hits = await drive_async(
            Cache(tiers).get_or_compute([], Engine([]).compute, EXPECT)
        )
        assert entries.vectors.shape == (0, DIMS) and hits.shape == (0,)

    asyncio.run(flow())


def test_no_tier_still_computes_equal_texts_once() -> None:
    """Without tiers nothing is kept, but a text twice in a call is one computation."""

    async def flow() -> None:
        cache = Cache([])
        assert (await ask(cache, [b"a", b"b", b"a"]))[0] == [b"a", b"b"]
        assert (await ask(cache, [b"a"]))[0] == [b"a"]

    asyncio.run(flow())


def test_another_space_is_another_vector() -> None:
    """A changed model never gets the old model's vectors."""

    async def flow() -> None:
        cache = Cache([Memory(MIB)])
        await ask(cache, some(3))
        engine = Engine(some(3))
        await drive_async(cache.get_or_compute(wanted(some(3), "another"), engine.compute, EXPECT))
        assert engine.computed == some(3)

    asyncio.run(flow())


def test_wrong_use_is_named() -> None:
    """Tiers of one name, a computation of another shape, and keys of other dims are refused."""

    def short(rows: list[int]) -> Flow[Entries]:
        yield from nothing()
        return Entries(np.ones((1, DIMS), np.float32), np.ones(1, np.int32))

    async def flow() -> None:
        cache = Cache([Memory(MIB)])
        with pytest.raises(InvalidInput, match=r"\(1, 384\).*for 2 items of 384 dims"):
            await drive_async(cache.get_or_compute(wanted(some(2)), short, EXPECT))
        await ask(cache, some(2))
        with pytest.raises(InvalidInput, match="other dims than 385"):
            await drive_async(cache.get_or_compute(wanted(some(2)), short, Expect(385)))

    asyncio.run(flow())
    with pytest.raises(InvalidInput, match="memory, memory"):
        Cache([Memory(MIB), Memory(MIB)])


def test_memory_stays_within_its_bytes() -> None:
    """What the process holds is at most `max_bytes`, and the recently used stays."""

    async def flow() -> None:
        tier = Memory(4 * MIB)
        cache = Cache([tier])
        await ask(cache, [b"used"])
        tracemalloc.start()
        for start in range(0, 20_000, 500):
            names = wanted([f"{row}".encode() for row in range(start, start + 500)])
            tier.put(list(zip(names, pack(names, Entries(np.ones((500, DIMS)), np.ones(500))))))
            assert (await ask(cache, [b"used"]))[1].all()
            assert tier.size_bytes <= 4 * MIB
        held_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert 3 * MIB < held_bytes <= 4 * MIB

    asyncio.run(flow())


# --- tiers together


def test_a_hit_is_written_to_the_tiers_above(tmp_path: Path, url: str) -> None:
    """Found in the lowest tier, a vector is in every tier before it."""

    async def flow() -> None:
        first = Cache([patient_redis(url, name="far")])
        await ask(first, some(600))
        await asyncio.to_thread(first.close)
        tiers: list[Tier] = [
            Memory(64 * MIB),
            patient_disk(tmp_path),
            patient_redis(url, name="near"),
            patient_redis(url, name="far"),
        ]
        cache = Cache(tiers)
        assert (await ask(cache, some(600)))[1].all()
        await asyncio.to_thread(cache.flush)
        counts = cache.stats()["tiers"]
        assert [counts[tier.name]["hits"] for tier in tiers] == [0, 0, 0, 600]
        assert [counts[tier.name]["written"] for tier in tiers] == [600, 600, 600, 0]
        for tier in tiers:
            assert None not in tier.get(wanted(some(600)))
        assert (await ask(cache, some(600)))[1].all()
        assert tier_stats(cache, "memory")["hits"] == 600
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


def temperature_hits(cache: Cache) -> list[int]:
    stats = tier_stats(cache, "redis")
    assert stats["hits"] == sum(stats[f"hits_{name}"] for name in TEMPERATURES)
    return [stats[f"hits_{name}"] for name in TEMPERATURES]


def test_redis_has_one_entry_that_a_hit_renews(url: str) -> None:
    """One key a vector, which lives 7 d after each use. It is hot until 1 h after its last use,
    warm until 24 h, cold until it expires, and hot again after a hit; each hit is counted so.
    """
    client = Client.from_url(url)
    uses = [  # unused for so long → hits so far: hot, warm, cold
        (0.0, [1, 0, 0]),
        (0.9 * HOUR_S, [2, 0, 0]),
        (1.1 * HOUR_S, [2, 1, 0]),
        (0.0, [3, 1, 0]),
        (0.9 * DAY_S, [3, 2, 0]),
        (1.1 * DAY_S, [3, 2, 1]),
        (6.9 * DAY_S, [3, 2, 2]),
        (0.0, [4, 2, 2]),
    ]

    async def flow() -> None:
        cache = Cache([patient_redis(url, prefix="h[1]*")])
        assert (await ask(cache, some(1)))[0] == some(1)
        await asyncio.to_thread(cache.flush)
        [name] = client.scan_iter()
        for unused_s, hits in uses:
            assert client.ttl(name) == pytest.approx(7 * DAY_S, abs=60)
            client.expire(name, round(7 * DAY_S - unused_s))
            assert (await ask(cache, some(1)))[1].all()
            assert temperature_hits(cache) == hits
        assert client.ttl(name) == pytest.approx(7 * DAY_S, abs=60)
        assert list(client.scan_iter()) == [name]
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_the_three_times_to_live_are_configurable(url: str) -> None:
    """Each of the three can be set, and so can none: then Redis alone evicts the entry."""
    client = Client.from_url(url)

    async def flow() -> None:
        cache = Cache([patient_redis(url, ttl_s=100.0, hot_ttl_s=10.0, warm_ttl_s=50.0)])
        await ask(cache, some(1))
        await asyncio.to_thread(cache.flush)
        [name] = client.scan_iter()
        for unused_s, hits in ((5, [1, 0, 0]), (20, [1, 1, 0]), (60, [1, 1, 1])):
            assert 90 < client.ttl(name) <= 100
            client.expire(name, 100 - unused_s)
            assert (await ask(cache, some(1)))[1].all()
            assert temperature_hits(cache) == hits
        await asyncio.to_thread(cache.close)
        cache = Cache([patient_redis(url, ttl_s=None, name="forever")])
        await ask(cache, some(1))
        await asyncio.to_thread(cache.flush)
        assert (await ask(cache, some(1)))[1].all()
        [name] = client.scan_iter("halimede:forever:*")
        assert client.ttl(name) == -1
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_a_hit_renews_its_own_entry_alone(url: str) -> None:
    """What is used gets its whole time again; what is not used keeps the time it has left."""
    client = Client.from_url(url)

    async def flow() -> None:
        tier = patient_redis(url)
        tier.put([(b"used", b"1"), (b"unused", b"2")])
        for name in client.scan_iter():
            client.expire(name, 1000)
        assert tier.get([b"used", b"unknown", b"used"]) == [b"1", None, b"1"]
        assert client.ttl("halimede:redis:used") == pytest.approx(7 * DAY_S, abs=60)
        assert 900 < client.ttl("halimede:redis:unused") <= 1000
        assert client.dbsize() == 2
        tier.close()

    asyncio.run(flow())


def test_redis_loses_its_scripts_without_a_miss(url: str) -> None:
    """A restarted Redis has forgotten the script; the next read loads it again."""

    async def flow() -> None:
        tier = patient_redis(url)
        tier.put([(b"a", b"1")])
        assert tier.get([b"a"]) == [b"1"]
        Client.from_url(url).script_flush()
        assert tier.get([b"a"]) == [b"1"]
        tier.close()

    asyncio.run(flow())


def test_each_tier_forgets_after_its_time(tmp_path: Path, url: str) -> None:
    """A disk or Redis value past its tier's `ttl_s` is a miss."""

    async def flow() -> None:
        for tier in (Disk(tmp_path, 64 * MIB, ttl_s=0.05), patient_redis(url, ttl_s=0.05)):
            tier.put([(b"a", b"1")])
            await asyncio.sleep(1.1)  # SQLite's row holds whole seconds
            assert tier.get([b"a"]) == [None]
            tier.close()

    asyncio.run(flow())


def test_neither_keys_nor_values_hold_a_text(tmp_path: Path, url: str) -> None:
    """The text is found neither in the files nor in Redis nor in the statistics."""

    async def flow() -> str:
        cache = Cache([Memory(MIB), patient_disk(tmp_path), patient_redis(url)])
        await ask(cache, [SECRET])
        await asyncio.to_thread(cache.close)
        return str(cache.stats())

    stats = asyncio.run(flow())
    client = Client.from_url(url)
    stored = b"".join(name + client.get(name) for name in client.scan_iter())
    stored += b"".join(path.read_bytes() for path in tmp_path.iterdir()) + stats.encode()
    assert len(stored) > 2 * 4 * DIMS
    assert SECRET not in stored and b"Ada" not in stored


def test_clear_leaves_what_is_not_ours(url: str) -> None:
    """Redis keys outside the tier's own prefix stay, also such as its pattern could match."""

    async def flow() -> None:
        tier = patient_redis(url, prefix="h?[a]*")
        client = Client.from_url(url)
        for name in (b"other", b"h?[a]*:redisX", b"hXa:redis:1", b"h?[a]*:redis2:1"):
            client.set(name, b"theirs")
        tier.put([(os.urandom(20), b"ours") for _ in range(2500)])
        assert client.dbsize() == 2504
        tier.clear()
        assert client.dbsize() == 4
        tier.close()

    asyncio.run(flow())


# --- calls at the same time


def test_concurrent_calls_compute_each_text_once() -> None:
    """Calls that overlap share their lookups and computations, whatever the order."""

    async def flow() -> None:
        for tiers in ([], [Memory(64 * MIB)], [Slow()]):
            cache = Cache(tiers)
            texts = some(60)
            engine = Engine(texts)
            rounds = [texts[start : start + 30] for start in range(31)]

            async def call(part: list[bytes], start: int) -> None:
                def compute(rows: list[int]) -> Flow[Entries]:
                    return (yield from engine.compute([start + row for row in rows]))

                entries, _ = await drive_async(cache.get_or_compute(wanted(part), compute, EXPECT))
                expected = engine.entries(range(start, start + 30))
                np.testing.assert_array_equal(entries.vectors, expected.vectors)

            calls = [call(part, start) for start, part in enumerate(rounds)]
            await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S)
            assert sorted(engine.computed) == sorted(texts)
            assert tiers or cache.stats()["shared"] == 30 * 31 - 60

    asyncio.run(flow())


class Held(Engine):
    """An engine whose computations wait to be let go."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        super().__init__(texts)
        self.go = Latch()

    def compute(self, rows: list[int]) -> Flow[Entries]:
        self.computed += [self.texts[row] for row in rows]
        yield from self.go.wait()
        return self.entries(rows)


def call(cache: Cache, engine: Engine) -> asyncio.Task:
    flow = cache.get_or_compute(wanted(engine.texts), engine.compute, EXPECT)
    return asyncio.create_task(drive_async(flow))


@pytest.mark.parametrize("held", ["lookup", "computation"])
def test_a_cancelled_call_leaves_its_work_to_one_that_waits(held: str) -> None:
    """When the call under way is cancelled, one waiting call does it, once, and all are answered."""

    async def flow() -> None:
        slow = Slow(reads=held == "lookup")
        cache = Cache([Memory(MIB), slow])
        first, others = Held(some(3)), Held(some(3))
        cancelled = call(cache, first)
        await asyncio.sleep(0.01)
        waiting = [call(cache, others) for _ in range(5)]
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.sleep(0.01)
        slow.reads.set()
        others.go.set()
        answers = await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE_S)
        assert cancelled.cancelled() and others.computed == some(3)
        for entries, _ in answers:
            np.testing.assert_array_equal(entries.vectors, others.entries(range(3)).vectors)

    asyncio.run(flow())


def test_a_failed_call_fails_alone() -> None:
    """The error goes to the call whose computation it was; those that wait compute themselves."""

    async def flow() -> None:
        cache = Cache([Memory(MIB)])
        fails = Latch()

        def fail(rows: list[int]) -> Flow[Entries]:
            yield from fails.wait()
            raise HalimedeError("theirs")

        failing = asyncio.create_task(
            drive_async(cache.get_or_compute(wanted(some(3)), fail, EXPECT))
        )
        await asyncio.sleep(0.01)
        engine = Engine(some(4)[1:])
        waiting = call(cache, engine)
        await asyncio.sleep(0.01)
        fails.set()
        with pytest.raises(HalimedeError, match="theirs"):
            await failing
        entries, _ = await asyncio.wait_for(waiting, PATIENCE_S)
        np.testing.assert_array_equal(entries.vectors, engine.entries(range(3)).vectors)
        # And nothing of it is left behind.
        assert (await ask(cache, some(4)))[0] == [some(1)[0]]

    asyncio.run(flow())


def test_a_waiting_call_can_be_cancelled() -> None:
    """That changes nothing for the call it waits for."""

    async def flow() -> None:
        cache = Cache([])
        engine = Held(some(2))
        first = call(cache, engine)
        await asyncio.sleep(0.01)
        second = call(cache, engine)
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        engine.go.set()
        entries, _ = await asyncio.wait_for(first, PATIENCE_S)
        assert second.cancelled() and len(entries.vectors) == 2 and engine.computed == some(2)

    asyncio.run(flow())


def test_a_text_found_does_not_wait_for_another_computation() -> None:
    """A call that needs what a slow call has found already is answered before that one."""

    async def flow() -> None:
        slow = Slow(reads=True)
        cache = Cache([slow])
        slow.held = dict(zip(wanted(some(1)), pack(wanted(some(1)), Engine(some(1)).entries([0]))))
        engine = Held(some(2))
        computing = call(cache, engine)
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(ask(cache, some(1)))
        await asyncio.sleep(0.01)
        slow.reads.set()
        computed, hits = await asyncio.wait_for(waiting, PATIENCE_S)
        assert not computed and hits.all() and not computing.done()
        assert engine.computed == [some(2)[1]]
        engine.go.set()
        await computing

    asyncio.run(flow())


def test_a_storm_of_calls_is_answered(tmp_path: Path, url: str) -> None:
    """Overlapping calls, some cancelled, some failing, a Redis that stalls now and then: every
    call gets its own vectors, its own error or its cancellation, and nothing is left under way.
    """
    chance = random.Random(7)
    texts = some(200)

    async def one(cache: Cache) -> str:
        part = chance.sample(texts, chance.randint(1, 60))
        engine, fails = Engine(part), chance.random() < 0.2

        def compute(rows: list[int]) -> Flow[Entries]:
            yield Wait((), time.monotonic() + chance.uniform(0, 0.01))
            if fails:
                raise HalimedeError("own")
            return (yield from engine.compute(rows))

        max_age_s = chance.choice([None, 0.05])
        call = cache.get_or_compute(wanted(part), compute, Expect(DIMS, max_age_s))
        try:
            entries, _ = await asyncio.wait_for(
                drive_async(call), chance.choice([0.005, 0.02, PATIENCE_S])
            )
        except TimeoutError:
            return "cancelled"
        except HalimedeError:
            assert fails
            return "failed"
        expected = engine.entries(range(len(part)))
        np.testing.assert_array_equal(entries.vectors, expected.vectors)
        return "answered"

    async def flow() -> None:
        proxy = Proxy(int(url.split(":")[2].split("/")[0]))
        async with proxy.listening() as stalling:
            tiers = [Memory(100_000), Disk(tmp_path, 64 * MIB), Redis(stalling, timeout_s=0.05)]
            cache = Cache(tiers)
            ends: list[str] = []
            for turn in range(200):
                (proxy.flows.clear if turn % 4 == 3 else proxy.flows.set)()
                ends += await asyncio.gather(*(one(cache) for _ in range(30)))
                seen = [ends.count(end) for end in ("answered", "failed", "cancelled")]
                if turn >= 19 and min(seen) > 10:
                    break
            assert min(seen) > 10
            await ask(cache, texts)
            assert not any(value["corrupt"] for value in cache.stats()["tiers"].values())
            await asyncio.to_thread(cache.close)

    asyncio.run(flow())


# --- writes in the background


def test_an_answer_waits_for_no_write() -> None:
    """While the tier still writes, the call is answered and its texts are found."""

    async def flow() -> None:
        slow = Slow(writes=True)
        cache = Cache([slow])
        assert (await ask(cache, some(5)))[0] == some(5)
        assert (await ask(cache, some(5)))[1].all()
        assert not slow.held and tier_stats(cache, "slow")["queue_bytes"] > 0
        slow.writes.set()
        await asyncio.to_thread(cache.flush)
        assert len(slow.held) == 5 and tier_stats(cache, "slow")["queue_bytes"] == 0

    asyncio.run(flow())


def test_what_waits_to_be_written_is_bounded() -> None:
    """Beyond QUEUE_BYTES vectors are not written, counted, and the calls go on."""

    async def flow() -> None:
        slow = Slow(writes=True)
        cache = Cache([slow])
        dims, texts = 3072, guarded.QUEUE_BYTES // (4 * 3072) + 500

        def compute(rows: list[int]) -> Flow[Entries]:
            yield from nothing()
            return Entries(np.ones((len(rows), dims), np.float32), np.ones(len(rows), np.int32))

        await drive_async(
            cache.get_or_compute(wanted(some(texts), dims=dims), compute, Expect(dims))
        )
        stats = tier_stats(cache, "slow")
        assert 0.99 * guarded.QUEUE_BYTES < stats["queue_bytes"] <= guarded.QUEUE_BYTES
        slow.writes.set()
        await asyncio.to_thread(cache.flush)
        stats = tier_stats(cache, "slow")
        assert stats["unwritten"] >= 500 and stats["written"] == len(slow.held)
        assert stats["written"] + stats["unwritten"] == texts

    asyncio.run(flow())


# --- a tier that is broken


def corrupt_redis(url: str, change: Callable[[Client, bytes], object]) -> None:
    client = Client.from_url(url)
    for name in list(client.scan_iter()):
        change(client, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda client, name: client.set(name, b""),
        lambda client, name: client.set(name, client.get(name)[:-1]),
        lambda client, name: client.set(name, b"a foreign value" * 100),
        lambda client, name: client.setrange(name, 100, b"\xff"),
    ],
    ids=["empty", "truncated", "foreign", "changed"],
)
def test_corrupt_values_in_redis_are_misses(url: str, change: Callable) -> None:
    """A value that was changed in Redis is computed again, counted, and replaced."""

    async def flow() -> None:
        cache = Cache([patient_redis(url)])
        await ask(cache, some(10))
        await asyncio.to_thread(cache.flush)
        corrupt_redis(url, change)
        assert (await ask(cache, some(10)))[0] == some(10)
        assert tier_stats(cache, "redis")["corrupt"] == 10
        await asyncio.to_thread(cache.flush)
        assert (await ask(cache, some(10)))[1].all()
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_another_type_in_redis_is_a_miss(url: str) -> None:
    """A list under one of our keys is not read, and replaced."""

    async def flow() -> None:
        cache = Cache([patient_redis(url)])
        await ask(cache, some(3))
        await asyncio.to_thread(cache.flush)
        corrupt_redis(url, lambda client, name: (client.delete(name), client.rpush(name, b"x")))
        assert (await ask(cache, some(3)))[0] == some(3)
        await asyncio.to_thread(cache.flush)
        assert (await ask(cache, some(3)))[1].all()
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


@pytest.mark.parametrize("bad", [b"", b"foreign", "text", 7], ids=str)
def test_corrupt_values_on_disk_are_misses(tmp_path: Path, bad: object) -> None:
    """A value that was changed in the file is computed again, counted, and replaced."""

    async def flow() -> None:
        cache = Cache([patient_disk(tmp_path)])
        await ask(cache, some(10))
        await asyncio.to_thread(cache.flush)
        with contextlib.closing(sqlite3.connect(tmp_path / disk.FILE_NAME)) as database, database:
            database.execute("UPDATE vectors SET value = ?", (bad,))
        assert (await ask(cache, some(10)))[0] == some(10)
        assert tier_stats(cache, "disk")["corrupt"] == 10
        await asyncio.to_thread(cache.flush)
        assert (await ask(cache, some(10)))[1].all()
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def flip_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:] = bytes(byte ^ 0x5A for byte in content[100:])
    path.write_bytes(content)


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"no database " * 10_000)
    other.replace(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no database " * 10_000),
        lambda path: os.truncate(path, 3 * disk.PAGE_BYTES + 100),
        flip_bytes,
        lambda path: path.unlink(),
        replace_file,
    ],
    ids=["foreign", "truncated", "changed", "removed", "replaced"],
)
@pytest.mark.parametrize("open_before", [False, True])
def test_a_broken_file_is_made_anew(tmp_path: Path, damage: Callable, open_before: bool) -> None:
    """A database that is none any more, open or not, is replaced; no call fails."""

    async def flow() -> None:
        filled = Cache([patient_disk(tmp_path, timeout_s=10)])
        await ask(filled, some(500))
        await asyncio.to_thread(filled.flush)
        if not open_before:
            await asyncio.to_thread(filled.close)
        else:  # merge the log, so that the damage is to what is read
            with contextlib.closing(sqlite3.connect(tmp_path / disk.FILE_NAME)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        damage(tmp_path / disk.FILE_NAME)
        cache = filled if open_before else Cache([patient_disk(tmp_path, timeout_s=10)])
        await ask(cache, some(500))
        await ask(cache, some(500, "more"))
        await until(lambda: tier_stats(cache, "disk")["queue_bytes"] == 0)
        await until(lambda: tier_stats(cache, "disk")["is_read"])
        assert (await ask(cache, some(500, "more")))[1].all()
        await asyncio.to_thread(cache.close)
        again = Cache([patient_disk(tmp_path, timeout_s=10)])
        assert (await ask(again, some(500, "more")))[1].all()
        assert tier_stats(again, "disk")["errors"] == 0
        await asyncio.to_thread(again.close)

    asyncio.run(flow())


@pytest.mark.needs("redis-server")
def test_redis_that_dies_is_left_out_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed under use, Redis costs hits and one log line; started again, it is used again."""
    caplog.set_level(logging.INFO, "halimede.cache")
    [port] = free_ports(1)

    async def flow() -> None:
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(redis_server.serve(tmp_path, port=port))
            cache = Cache([patient_redis(url)])
            await ask(cache, some(5))
            await asyncio.to_thread(cache.flush)
            busy = [asyncio.create_task(ask(cache, some(300, str(part)))) for part in range(10)]
            await asyncio.sleep(0)
            stack.close()
            await asyncio.gather(*busy)
        for part in range(20):
            assert (await ask(cache, some(1, f"down {part}")))[0]
        await ask(cache, [SECRET])
        stats = tier_stats(cache, "redis")
        assert not stats["is_read"] and stats["skipped"] >= 1 and not stats["is_written"]
        await until(lambda: tier_stats(cache, "redis")["errors"] > stats["errors"] + 3)
        with redis_server.serve(tmp_path, port=port):
            await until(lambda: tier_stats(cache, "redis")["is_read"])
            await until(lambda: tier_stats(cache, "redis")["queue_bytes"] == 0)
            assert patient_redis(url).get(wanted([SECRET])) != [None]
            await ask(cache, some(5))
            await asyncio.to_thread(cache.flush)
            assert (await ask(cache, some(5)))[1].all()
            await asyncio.to_thread(cache.close)

    asyncio.run(flow())
    warnings = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert len(warnings) == 2 and all("redis" in line for line in warnings)
    assert {"reads" in line for line in warnings} == {True, False}
    assert not any(str(port) in line or "Ada" in line for line in caplog.messages)


@pytest.mark.needs("redis-server")
def test_a_full_redis_is_still_read(tmp_path: Path) -> None:
    """At `maxmemory` with noeviction writes wait and hits go on; with room again, all is written."""

    async def flow(url: str) -> None:
        cache = Cache([patient_redis(url)])
        await ask(cache, some(100))
        await asyncio.to_thread(cache.flush)
        Client.from_url(url).config_set("maxmemory", 1)
        assert (await ask(cache, some(300, "more")))[0] == some(300, "more")
        await asyncio.to_thread(cache.flush)
        for _ in range(3):
            assert (await ask(cache, some(100)))[1].all()
        stats = tier_stats(cache, "redis")
        assert (
            stats["is_read"] and not stats["is_written"] and stats["queue_bytes"] > 300 * 4 * DIMS
        )
        await until(lambda: tier_stats(cache, "redis")["errors"] > stats["errors"] + 2)
        Client.from_url(url).config_set("maxmemory", 0)
        await until(lambda: tier_stats(cache, "redis")["queue_bytes"] == 0)
        assert Client.from_url(url).dbsize() == 400
        assert tier_stats(cache, "redis")["is_written"]
        await asyncio.to_thread(cache.close)

    with redis_server.serve(tmp_path, "--maxmemory-policy", "noeviction") as url:
        asyncio.run(flow(url))


class Proxy:
    """Passes bytes on to a port until it is told to stall."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.flows = asyncio.Event()
        self.flows.set()
        self.tasks: set[asyncio.Task] = set()

    @contextlib.asynccontextmanager
    async def listening(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        for source, sink in ((reader, back), (there, writer)):
            self.tasks.add(asyncio.create_task(self._pass(source, sink)))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(sink):
            while data := await source.read(65536):
                await self.flows.wait()
                sink.write(data)


def test_redis_that_stalls_makes_one_call_wait(url: str) -> None:
    """A stalled Redis is waited for once, up to `timeout_s`; then it is skipped until it answers."""

    async def flow() -> None:
        proxy = Proxy(int(url.split(":")[2].split("/")[0]))
        async with proxy.listening() as stalling:
            cache = Cache([Redis(stalling, timeout_s=1.0)])
            await ask(cache, some(5))
            await asyncio.to_thread(cache.flush)
            assert (await ask(cache, some(5)))[1].all()
            proxy.flows.clear()
            await ask(cache, some(5))
            assert tier_stats(cache, "redis")["skipped"] == 5
            for part in range(100):
                assert (await ask(cache, some(5, f"{part}")))[0]
            assert tier_stats(cache, "redis")["skipped"] == 505
            errors = tier_stats(cache, "redis")["errors"]
            await until(lambda: tier_stats(cache, "redis")["errors"] > errors + 2)
            proxy.flows.set()
            await until(lambda: tier_stats(cache, "redis")["is_read"])
            assert (await ask(cache, some(5)))[1].all()
            await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def test_a_disk_that_is_full_is_still_read(tmp_path: Path) -> None:
    """When files cannot grow, writes wait and hits go on; with room again, all is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def flow() -> None:
        cache = Cache([patient_disk(tmp_path)])
        await ask(cache, some(100))
        await asyncio.to_thread(cache.flush)
        largest = max(path.stat().st_size for path in tmp_path.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        assert (await ask(cache, some(2000, "more")))[0] == some(2000, "more")
        await asyncio.to_thread(cache.flush)
        assert (await ask(cache, some(100)))[1].all()
        stats = tier_stats(cache, "disk")
        assert stats["is_read"] and not stats["is_written"] and stats["queue_bytes"] > 0
        await until(lambda: tier_stats(cache, "disk")["errors"] > stats["errors"] + 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await until(lambda: tier_stats(cache, "disk")["queue_bytes"] == 0)
        await asyncio.to_thread(cache.close)
        cache = Cache([patient_disk(tmp_path)])
        assert (await ask(cache, some(2000, "more")))[1].all()
        await asyncio.to_thread(cache.close)

    try:
        asyncio.run(flow())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_made_is_no_outage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Permission denied, or a file in the way: misses, two log lines without the path."""
    (tmp_path / "file").write_text("in the way")

    async def flow() -> None:
        cache = Cache([Memory(MIB), Disk(tmp_path / "file" / "cache", 64 * MIB)])
        for part in range(5):
            assert (await ask(cache, some(2, f"{part}")))[0]
            await asyncio.to_thread(cache.flush)
        stats = tier_stats(cache, "disk")
        assert not stats["is_read"] and stats["skipped"] == 10 and stats["written"] == 0
        with pytest.raises(HalimedeError, match="tier disk could not be cleared") as raised:
            await asyncio.to_thread(cache.clear)
        assert str(tmp_path) not in str(raised.value)
        assert tier_stats(cache, "memory")["size_bytes"] == 0
        await ask(cache, some(2))
        await asyncio.to_thread(cache.close)
        assert tier_stats(cache, "disk")["unwritten"] == 2

    asyncio.run(flow())
    assert len(caplog.messages) == 2 and not any(str(tmp_path) in line for line in caplog.messages)


def test_disk_stays_within_its_bytes(tmp_path: Path) -> None:
    """Files take at most `max_bytes`; the first written leave, the last written stay."""

    async def flow() -> None:
        tier = patient_disk(tmp_path, disk.MIN_BYTES)
        largest = 0
        for start in range(0, 30_000, 500):
            names = [row.to_bytes(20, "big") for row in range(start, start + 500)]
            tier.put([(name, os.urandom(1560)) for name in names])
            largest = max(largest, sum(path.stat().st_size for path in tmp_path.iterdir()))
            assert None not in tier.get(names)
        assert disk.MIN_BYTES * 0.7 < largest <= disk.MIN_BYTES
        assert tier.get([bytes(20)]) == [None]
        assert tier.size_bytes <= disk.MIN_BYTES
        tier.close()

    asyncio.run(flow())
    with pytest.raises(InvalidInput, match="max_bytes is 1000"):
        Disk(tmp_path, 1000)


def test_a_cleared_disk_holds_nothing(tmp_path: Path) -> None:
    """After `clear` the vectors' bytes are in no file, while another tier has the folder open."""

    async def flow() -> None:
        tier, other = patient_disk(tmp_path), patient_disk(tmp_path)
        value = bytes(range(256)) * 4
        for tier_ in (tier, other):
            tier_.put([(os.urandom(20), value) for _ in range(2000)])
            tier_.get([b"a"])
        assert any(value in path.read_bytes() for path in tmp_path.iterdir())
        tier.clear()
        assert not any(value in path.read_bytes() for path in tmp_path.iterdir())
        other.put([(b"a", b"1")])
        assert tier.get([b"a"]) == [b"1"]
        tier.close()
        other.close()

    asyncio.run(flow())


def fill(folder: Path, part: int) -> None:
    """One process's work: write and read what the others write too."""

    async def flow() -> None:
        cache = Cache([patient_disk(folder)])
        for start in range(0, 1000, 100):
            shared, own = some(1000)[start : start + 100], some(50, f"{part} {start}")
            await ask(cache, shared)
            await ask(cache, own)
            await asyncio.to_thread(cache.flush)
            assert (await ask(cache, own))[1].all()
        stats = tier_stats(cache, "disk")
        assert stats["errors"] == stats["corrupt"] == stats["unwritten"] == 0
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def run_all(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Start the processes, and have each end well."""
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def open_together(folder: Path, together: multiprocessing.synchronize.Barrier) -> None:
    """One process's work: ask new folders' caches in the moment the others ask them too."""

    async def flow() -> None:
        for turn in range(30):
            disk = patient_disk(folder / str(turn))
            together.wait(PATIENCE_S)
            assert disk.get([b"a"]) == [None]
            disk.close()

    asyncio.run(flow())


def test_processes_open_a_disk_together(tmp_path: Path) -> None:
    """Who comes while the file is being made waits for it instead of failing."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(4)
    run_all([context.Process(target=open_together, args=(tmp_path, together)) for _ in range(4)])


def test_processes_share_a_disk(tmp_path: Path) -> None:
    """Four processes that open, write and read one folder at once lose nothing."""
    context = multiprocessing.get_context("spawn")
    run_all([context.Process(target=fill, args=(tmp_path, part)) for part in range(4)])

    async def flow() -> None:
        cache = Cache([patient_disk(tmp_path)])
        assert (await ask(cache, some(1000)))[1].all()
        await asyncio.to_thread(cache.close)

    asyncio.run(flow())


def write_forever(folder: Path, started: multiprocessing.synchronize.Event) -> None:
    """One process's work until it is killed."""

    async def flow() -> None:
        tier = patient_disk(folder, disk.MIN_BYTES)
        for start in itertools.count(0, 100):
            texts = [f"{row % 5000}".encode() for row in range(start, start + 100)]
            names = wanted(texts)
            tier.put(list(zip(names, pack(names, Engine(texts).entries(range(100))))))
            started.set()

    asyncio.run(flow())


def test_a_killed_writer_leaves_whole_values(tmp_path: Path) -> None:
    """After SIGKILL in the middle of writes the folder opens, and no value in it is corrupt."""
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        started = context.Event()
        process = context.Process(target=write_forever, args=(tmp_path, started))
        process.start()
        assert started.wait(PATIENCE_S)
        time.sleep(random.uniform(0.05, 0.3))
        process.kill()
        process.join()

        async def flow() -> None:
            cache = Cache([patient_disk(tmp_path, disk.MIN_BYTES)])
            _, hits = await ask(cache, [f"{row}".encode() for row in range(5000)])
            stats = tier_stats(cache, "disk")
            assert hits.any() and stats["corrupt"] == stats["errors"] == 0
            await asyncio.to_thread(cache.close)

        asyncio.run(flow())


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Others of the machine cannot read the vectors."""

    async def flow() -> None:
        tier = patient_disk(tmp_path / "deep" / "cache")
        tier.put([(b"a", b"1")])
        tier.close()

    asyncio.run(flow())
    assert (tmp_path / "deep" / "cache").stat().st_mode & 0o777 == 0o700


# --- Redis as an extra


def test_a_missing_package_names_its_extra() -> None:
    """Without the package the cache is imported and works; a Redis tier says what to install."""
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "from halimede.cache import Memory, Redis\n"
        "from halimede_ops.errors import MissingExtra\n"
        "try: Redis('redis://localhost')\n"
        "except MissingExtra as error: print(error)\n"
    )
    path = os.pathsep.join([str(ROOT / name) for name in ("client", "python_backend", "tools")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "halimede[redis]" in done.stdout
    assert issubclass(MissingExtra, HalimedeError)


@pytest.mark.parametrize(
    "bad", ["localhost:6379", "http://u:hunter2@host", "redis://u:hunter2@host:x"]
)
def test_a_wrong_url_is_refused_without_repeating_it(bad: str) -> None:
    """A url may hold a password: the error names the form and not the url."""
    with pytest.raises(InvalidInput, match="redis://host:port") as raised:
        Redis(bad)
    assert "hunter2" not in str(raised.value)
    assert raised.value.__cause__ is None
