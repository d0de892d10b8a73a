"""Fixtures: models on a real Triton and the same in this process, and clients of fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import MODEL
from framework_clients import Arguments, in_process
from gateways import Kinds

from halimede import Embedder, Reranker
from halimede.testing import FakeProvider
from halimede_tools.settings import Settings

WHERE = ("triton", "in process")


@pytest.fixture(scope="module", params=WHERE)
def default_model(request: pytest.FixtureRequest, settings: Settings) -> Iterator[dict[str, Any]]:
    """Arguments of a client for the default model."""
    if request.param == "triton":
        yield {"url": request.getfixturevalue("server").grpc_address}
    else:
        yield in_process(settings.repository, MODEL)


@pytest.fixture(scope="module", params=WHERE)
def small_model(request: pytest.FixtureRequest, kinds: Kinds) -> Arguments:
    """Arguments of a client for a small model of any kind, by its name."""
    if request.param == "triton":
        return lambda name: {"model": name, "url": kinds.server.grpc_address}
    return lambda name: {"model": name, **in_process(kinds.repository, name)}


@pytest.fixture
def embedder() -> Iterator[Embedder]:
    with Embedder(providers=[FakeProvider()]) as client:
        yield client


@pytest.fixture
def reranker() -> Iterator[Reranker]:
    with Reranker(providers=[FakeProvider(kind="reranker")]) as client:
        yield client
