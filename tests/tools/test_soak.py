"""The soak: what it counts, what it demands, and a short one on the tests' own server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from conftest import NAMES, own_bytes

from halimede_tools.bench import soak
from halimede_tools.serve import wheel

SERVED = {NAMES["fp32"]: "fp32", NAMES["int8"]: "int8"}


def parts(**last: object) -> list[soak.Part]:
    """Ten equal parts of a run in which everything holds; the last with these fields."""
    one = {"requests": 100, "texts": 100, "seconds": 1.0, "memory_bytes": 10**8}
    made = [soak.Part(**one, latencies_s=[0.01] * 100) for _ in range(soak.PARTS)]
    for name, value in last.items():
        setattr(made[-1], name, value)
    return made


@pytest.mark.parametrize(
    ("last", "missed"),
    [
        ({}, []),
        ({"errors": Counter({"UNAVAILABLE": 1})}, ["errors"]),
        ({"wrong": 1}, ["wrong vectors"]),
        ({"memory_bytes": 106_000_000}, ["memory, last tenth over first"]),
        ({"latencies_s": [0.01] * 98 + [0.013] * 2}, ["p99, last tenth over first"]),
        ({"latencies_s": []}, ["p99, last tenth over first"]),
    ],
    ids=["all holds", "an error", "a wrong vector", "memory", "drift", "no answer"],
)
def test_what_does_not_hold_is_found(last: dict[str, object], missed: list[str]) -> None:
    """One error, one wrong vector, 6 % more memory or a p99 1.3 times as high: each is told."""
    assert [goal.name for goal in soak.judge(parts(**last)) if not goal.holds] == missed


def test_wrong_vectors_are_counted() -> None:
    """A vector of another text is wrong, and so is every one of an answer of another shape."""
    expected = np.eye(3, 8, dtype=np.float32)
    request = soak.Request(b"", expected, cosine=0.9999)
    assert soak.wrong(expected, request) == 0
    assert soak.wrong(expected[[0, 2, 1]], request) == 2
    assert soak.wrong(expected[:2], request) == 3
    assert soak.wrong(expected * np.float32(np.nan), request) == 3


def test_requests_come_in_another_order_each_time_and_the_same_each_run() -> None:
    """All are sent as often as each other, by a fixed seed."""
    made = [soak.Request(bytes([number]), None) for number in range(50)]

    def first(count: int) -> list[bytes]:
        endless: Iterator[soak.Request] = soak.shuffled(made)
        return [next(endless).message for _ in range(count)]

    assert first(100) == first(100)
    assert sorted(first(50)) == sorted(first(100)[50:]) == [one.message for one in made]
    assert first(50) != first(100)[50:]


def test_answers_that_must_not_be_are_errors(server: wheel.Server) -> None:
    """A refusal of a good request, another refusal than its own, and an answer to a bad request."""
    import grpc

    one = np.ones((1, 384), np.float32)
    good = soak.message(NAMES["fp32"], [b"a"])
    unknown = soak.message(NAMES["fp32"], [b"a"], input_types=["none"])
    requests = [
        soak.Request(unknown, one),
        soak.Request(unknown, None, "InvalidText: "),
        soak.Request(good, None, "UnknownInputType: "),
        soak.Request(unknown, None, "UnknownInputType: "),
        soak.Request(soak.message("no-such-model", [b"a"]), one),
    ]

    async def run() -> soak.Part:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            return await soak.send(channel.unary_unary(soak.INFER), iter(requests), 2)

    part = asyncio.run(run())
    assert part.errors == {"INVALID_ARGUMENT": 2, "not refused": 1, "NOT_FOUND": 1}
    assert part.requests == 5


def test_ten_thousand_mixed_and_bad_requests(
    server: wheel.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 requests to two precisions: all answered, each vector its text's own, each bad one
    refused with its own error, memory flat.
    """
    monkeypatch.setattr(soak, "memory_bytes", own_bytes)
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = asyncio.run(soak.load(server, SERVED, requests=10_000, concurrency=16))
    assert sum(part.requests for part in found) == 10_000
    goals = {goal.name: goal for goal in soak.judge(found)}
    assert goals["errors"].holds, [part.errors for part in found]
    assert goals["wrong vectors"].holds, goals["wrong vectors"].measured
    assert found[-1].memory_bytes <= 1.1 * found[0].memory_bytes
    assert all(process.is_running() for process in family)
