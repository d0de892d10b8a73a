"""The server's memory of texts that come again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from conftest import MODEL, free_options
from hypothesis import given
from hypothesis import strategies as st
from scrapes import figures
from tritonclient.utils import InferenceServerException

from halimede_engine.response_cache import ENTRY_BYTES, Entry, ResponseCache
from halimede_ops.errors import ServeError
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

BOTH = ("EMBEDDING", "TOKENS")
CACHED = "halimede_cached_texts_total"


@pytest.fixture(scope="module")
def cached(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    """A running Triton with the default model in FP32 and a response cache."""
    run = tmp_path_factory.mktemp("cached")
    options = free_options(models=(MODEL,), response_cache_mb=1)
    with wheel.serve(settings.repository, settings.python_backend, run, options) as running:
        yield running


def ask(
    server: wheel.Server,
    texts: list[str],
    dimensions: int | None = None,
    outputs: tuple[str, ...] = BOTH,
) -> dict[str, np.ndarray | None]:
    """The outputs that an answer has."""
    inputs = [grpcclient.InferInput("TEXT", [len(texts), 1], "BYTES")]
    values = np.array([text.encode() for text in texts], np.object_).reshape(-1, 1)
    inputs[0].set_data_from_numpy(values)
    if dimensions is not None:
        inputs.append(grpcclient.InferInput("DIMENSIONS", [len(texts), 1], "INT32"))
        inputs[1].set_data_from_numpy(np.full((len(texts), 1), dimensions, np.int32))
    wanted = [grpcclient.InferRequestedOutput(name) for name in outputs]
    with grpcclient.InferenceServerClient(server.grpc_address) as client:
        answer = client.infer(MODEL, inputs, outputs=wanted)
    return {name: answer.as_numpy(name) for name in BOTH}


def test_whatever_was_asked_before_an_answer_is_that_of_a_server_without_cache(
    server: wheel.Server, cached: wheel.Server
) -> None:
    """Fewer outputs, other dimensions, other neighbours, a text that another begins with: none of
    them changes what the next request gets; and what came again was not run again.
    """
    long = "word " * 300
    asked: list[dict[str, Any]] = [
        dict(texts=["hello world"], outputs=("EMBEDDING",)),
        dict(texts=["hello world"]),
        dict(texts=["hello world"], outputs=("TOKENS",)),
        dict(texts=["hello world"], dimensions=8),
        dict(texts=["hello world"], dimensions=384),
        dict(texts=["hello world", "hello world"], dimensions=8),
        dict(texts=["hello ", "world"]),
        dict(texts=["hello", " world"]),
        dict(texts=["", long, "hello world", long + "x"]),
        dict(texts=[long]),
    ]
    for request in asked + asked:
        expected, given = ask(server, **request), ask(cached, **request)
        for name, values in expected.items():
            if values is None:
                assert given[name] is None
            else:
                np.testing.assert_allclose(given[name], values, atol=1e-5)
    known = 5 + 1 + 1  # of the first round: "hello world" six times again and once beside others
    second = sum(len(request["texts"]) for request in asked)
    figures(cached, lambda found: found[CACHED] >= known + second)


def test_an_error_is_no_answer_to_the_next_request(cached: wheel.Server) -> None:
    """A request that failed fails again, and one that differs in what was wrong does not."""
    for _ in range(2):
        with pytest.raises(InferenceServerException, match="InvalidDimensions"):
            ask(cached, ["an error"], dimensions=0)
    assert ask(cached, ["an error"])["EMBEDDING"] is not None


def test_the_steps_have_no_cache() -> None:
    """Asking for one is refused: Triton's own would hand out answers with outputs missing."""
    with pytest.raises(ServeError, match="no response cache"):
        wheel.Options(steps=True, response_cache_mb=1)


@given(st.lists(st.sampled_from("abcdef"), max_size=60))
def test_what_was_asked_for_last_is_kept_in_bounded_memory(texts: list[str]) -> None:
    """Of the texts asked for, the latest three are known, each with what it gave."""
    vectors = {text: np.full(10, ord(text), np.float32) for text in "abcdef"}
    cache = ResponseCache(3 * (ENTRY_BYTES + vectors["a"].nbytes))
    latest: list[str] = []
    for text in texts:
        [found] = cache.get([text])
        assert (found is not None) == (text in latest)
        if found is None:
            cache.put([text], [Entry(vectors[text], 1)])
        else:
            assert (found.vector == vectors[text]).all()
        latest = [one for one in latest if one != text][-2:] + [text]


def test_without_memory_nothing_is_kept() -> None:
    """A cache of no size knows no text."""
    cache = ResponseCache(0)
    cache.put(["a"], [Entry(np.zeros(3, np.float32), 1)])
    assert cache.get(["a"]) == [None]
