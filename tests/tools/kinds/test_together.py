"""One server with a model of every kind of text, and many callers of all of them at once."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_models
from conftest import free_options, resident_bytes

from halimede import Classifier, Embedder, Reranker
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

MODELS = {
    "embedder": small_models.like_minilm,
    "static": small_models.like_potion,
    "reranker": small_models.bert_reranker,
    "classifier": small_models.topic_classifier,
    "splade": small_models.like_splade,
    "colbert": small_models.like_colbert,
}
CALLERS = 32
REQUESTS = int(os.environ.get("HALIMEDE_MIXED_REQUESTS", "960"))
"""Requests of all callers together; 10,000 take some minutes."""
TEXTS = corpus.mixed_texts(200, seed=5)
GROWTH_BYTES = 40_000_000
"""What the server may grow by between the first and the second half of the requests."""


class Ask(NamedTuple):
    """One request, and what it gave a lone caller."""

    send: Callable[[], list[np.ndarray]]
    expected: list[np.ndarray]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    folder = tmp_path_factory.mktemp("kinds")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, make in MODELS.items():
        build(build_request(str(make(folder / name)), name, precisions=("fp32",)), home)
    options = free_options()
    with wheel.serve(home.repository, home.python_backend, folder / "run", options) as running:
        yield running


def clients(address: str) -> dict[str, Any]:
    """A client for each model; its threads share the connection."""
    kinds: dict[str, Any] = {"reranker": Reranker, "classifier": Classifier}
    return {
        name: kinds[name](name, url=address) if name in kinds else Embedder(address, name)
        for name in MODELS
    }


def requests(asked: dict[str, Any], chance: random.Random) -> Iterator[Callable[[], Any]]:
    """Requests of one to sixteen texts of every kind, by turns."""

    def send(name: str, texts: list[str]) -> list[np.ndarray]:
        client = asked[name]
        if name == "reranker":
            return list(client.score([(texts[0], text) for text in texts]).scores.reshape(-1, 1))
        if name == "classifier":
            return list(client.classify(texts).scores)
        if name == "splade":
            sparse = client.embed_sparse(texts)
            return [np.stack(row) for row in zip(sparse.ids, sparse.weights, strict=True)]
        if name == "colbert":
            input_type = "query" if len(texts[0]) % 2 else "document"
            return list(client.embed_multi(texts, input_type=input_type).vectors)
        return list(client.embed(texts).vectors)

    for place in range(96):
        texts = chance.sample(TEXTS, chance.choice([1, 1, 2, 5, 16]))
        name = list(MODELS)[place % len(MODELS)]
        yield lambda name=name, texts=texts: send(name, texts)


def is_right(given: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(given) == len(expected) and all(
        one.shape == other.shape and np.allclose(one, other, atol=1e-4)
        for one, other in zip(given, expected, strict=True)
    )


def test_every_kind_is_answered_right_beside_all_others(server: wheel.Server) -> None:
    """32 callers mix requests of six models: each answer is that of a lone caller, and the
    server's memory stays the same.
    """
    asked = clients(server.grpc_address)
    asks = [Ask(send, send()) for send in requests(asked, random.Random(1))]

    def call(number: int) -> bool:
        ask = asks[number % len(asks)]
        return is_right(ask.send(), ask.expected)

    with ThreadPoolExecutor(CALLERS) as callers:
        first = list(callers.map(call, range(REQUESTS // 2)))
        before = resident_bytes(server.process.pid)
        second = list(callers.map(call, range(REQUESTS // 2, REQUESTS)))
    grown = resident_bytes(server.process.pid) - before
    for client in asked.values():
        client.close()
    assert all(first + second)
    assert grown < GROWTH_BYTES, f"{grown:,} bytes over {REQUESTS // 2} requests"
