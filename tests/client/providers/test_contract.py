"""What every provider must hold, asked of each through the embedder that users have.

Triton, onnx and sentence_transformers run the real default model; openai, ollama and huggingface
are the official SDKs against simulations of the protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulations
from conftest import MODEL

from halimede import (
    AsyncEmbedder,
    DeadlineExceeded,
    Embedder,
    InvalidDimensions,
    InvalidText,
    UnknownInputType,
)
from halimede_ops import vectors
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KINDS = (
    "triton-grpc",
    "triton-http",
    "onnx",
    "sentence_transformers",
    "openai",
    "ollama",
    "huggingface",
    "hash",
)
REAL = ("triton-grpc", "triton-http", "onnx", "sentence_transformers")


@pytest.fixture(scope="module")
def simulated() -> Iterator[dict[str, simulations.Simulation]]:
    with contextlib.ExitStack() as running:
        yield {
            name: running.enter_context(simulations.serve(getattr(simulations, name)))
            for name in ("openai", "ollama", "huggingface")
        }


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(
    kind: str,
    server: wheel.Server,
    settings: Settings,
    source: Path,
    simulated: dict[str, simulations.Simulation],
) -> dict[str, Any]:
    """The configuration of one provider alone."""
    options = {
        "triton-grpc": {"model_id": MODEL, "url": server.grpc_address},
        "triton-http": {"model_id": MODEL, "url": f"http://{server.http_address}"},
        "onnx": {"model_id": MODEL, "path": str(settings.repository)},
        "sentence_transformers": {"model_id": MODEL, "path": str(source)},
        "openai": {"model_id": "text-embedding-3-small", "url": simulated["openai"].url + "/v1"},
        "ollama": {"model_id": "minilm", "url": simulated["ollama"].url},
        "huggingface": {"model_id": MODEL, "url": simulated["huggingface"].url},
        "hash": {"model_id": "hash"},
    }[kind]
    model = {"provider": kind.partition("-")[0], "timeout": 180, **options}
    return {"models": {"only": model}}


@pytest.fixture(scope="module")
def embedder(config: dict[str, Any]) -> Iterator[Embedder]:
    with Embedder(config=config) as opened:
        yield opened


def test_results_say_what_they_are(embedder: Embedder, kind: str) -> None:
    """Provider, model, space and precision are told, and are those of `model`."""
    result = embedder.embed("a")
    assert result.provider == kind.partition("-")[0]
    assert (result.model, result.space, result.precision) == (
        embedder.model.name,
        embedder.model.space,
        embedder.model.precision,
    )
    assert len(result.space) == 16
    assert int(result.space, 16) >= 0
    assert result.vectors.shape == (1, embedder.model.dims)
    assert result.vectors.dtype == np.float32
    assert result.cached.tolist() == [False]


def test_vectors_are_those_of_the_model(
    embedder: Embedder, kind: str, texts: list[str], expected: np.ndarray
) -> None:
    """The real model's providers agree with sentence-transformers on odd and ordinary texts."""
    if kind not in REAL:
        pytest.skip("a simulation or a hash has no reference")
    result = embedder.embed(texts[:200])
    assert vectors.cosine(result.vectors, expected[:200]).min() >= 0.99999
    assert (result.tokens > 0).all()


def test_order_is_kept_in_a_huge_batch_of_mixed_lengths(embedder: Embedder, kind: str) -> None:
    """Each of 700 texts (5,000 hashes) has the vector it has alone, whatever its length."""
    count = 5000 if kind == "hash" else 700
    texts = [f"{index} " + "word " * (index * 37 % 60) for index in range(count)]
    result = embedder.embed(texts)
    picked = [0, 1, 127, 128, 350, 699, count - 1]
    alone = np.concatenate([embedder.embed(texts[index]).vectors for index in picked])
    assert len(result) == count
    assert vectors.cosine(result.vectors[picked], alone).min() >= 0.9999


def test_nothing_in_gives_no_rows(embedder: Embedder) -> None:
    """No text gives arrays of no rows and the right width."""
    result = embedder.embed([])
    assert result.vectors.shape == (0, embedder.model.dims)
    assert (len(result.tokens), len(result.cached), len(result.truncated)) == (0, 0, 0)


def test_unicode_is_embedded(embedder: Embedder) -> None:
    """Scripts, emoji, right-to-left and control characters give finite, distinct vectors."""
    texts = ["звезда", "星", "نجمة", "⭐️👩‍🚀", "e\u0301", "a\u0000b\u202ec", "  spaces  "]
    result = embedder.embed(texts)
    assert np.isfinite(result.vectors).all()
    assert np.allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-4)


def test_input_types(embedder: Embedder) -> None:
    """Query and document are taken by all; another name is refused without being repeated."""
    for input_type in ("query", "document"):
        assert embedder.embed("cats", input_type=input_type).vectors.shape[0] == 1
    with pytest.raises(UnknownInputType, match="document, query") as raised:
        embedder.embed("cats", input_type="s3cret")
    assert "s3cret" not in str(raised.value)


def test_dimensions_are_the_leading_ones_normalised(embedder: Embedder) -> None:
    """Fewer dimensions are the vector's first ones, of norm 1 again; too many are refused."""
    full = embedder.embed(["a cat", "a dog"]).vectors
    cut = embedder.embed(["a cat", "a dog"], dimensions=256).vectors
    assert cut.shape == (2, 256)
    assert vectors.cosine(cut, full[:, :256]).min() >= 0.9999
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-4)
    for wrong in (0, -1, embedder.model.dims + 1):
        with pytest.raises(InvalidDimensions, match=f"1 to {embedder.model.dims}"):
            embedder.embed("a", dimensions=wrong)


def test_what_is_no_text_is_refused(embedder: Embedder) -> None:
    """Numbers and lone surrogates are refused before anything is sent."""
    with pytest.raises(InvalidText, match="text 1 is int"):
        embedder.embed(["a", 3])  # type: ignore[list-item]
    with pytest.raises(InvalidText, match="lone surrogate"):
        embedder.embed("\ud800")


def test_a_deadline_ends_the_call_and_nothing_else(embedder: Embedder) -> None:
    """A call that takes longer than its deadline ends with DeadlineExceeded; the next works."""
    with pytest.raises(DeadlineExceeded, match="deadline_s"):
        embedder.embed([f"a text {index}" for index in range(20_000)], deadline_s=0.005)
    assert len(embedder.embed("still here")) == 1


def test_threads_share_an_embedder(embedder: Embedder) -> None:
    """Eight threads, each with its own texts, get their own vectors."""
    texts = [f"text number {index}" for index in range(64)]
    expected = embedder.embed(texts).vectors
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(lambda text: embedder.embed(text).vectors[0], texts))
    assert vectors.cosine(np.array(found), expected).min() >= 0.9999


def test_tasks_share_an_embedder(config: dict[str, Any], embedder: Embedder) -> None:
    """Tasks of one program get their own vectors, and a cancelled one harms no other."""
    texts = [f"text number {index}" for index in range(32)]
    expected = embedder.embed(texts).vectors

    async def ask() -> np.ndarray:
        async with AsyncEmbedder(config=config) as opened:
            await opened.embed("warm")
            at_once, midway = [
                asyncio.ensure_future(opened.embed(["word " * 5] * 5000)) for _ in range(2)
            ]
            await asyncio.sleep(0)  # both are sent, and no answer can have come here yet
            at_once.cancel()
            await asyncio.sleep(0.01)
            midway.cancel()
            results = await asyncio.gather(*[opened.embed(text) for text in texts])
            with pytest.raises(asyncio.CancelledError):
                await at_once
            with contextlib.suppress(asyncio.CancelledError):  # a hash may have been quicker
                await midway
            return np.concatenate([result.vectors for result in results])

    assert vectors.cosine(asyncio.run(ask()), expected).min() >= 0.9999


def test_health_says_healthy(embedder: Embedder) -> None:
    """Each provider embeds a probe and tells its latency."""
    [report] = embedder.health()
    assert report["healthy"], report
    assert report["latency_ms"] >= 0


def test_closing_twice_is_fine(config: dict[str, Any]) -> None:
    """A second close does nothing, also on an embedder that was never used."""
    embedder = Embedder(config=config)
    embedder.close()
    embedder.close()
    with Embedder(config=config) as used:
        used.embed("a")
        used.close()


def test_a_stream_gives_what_a_call_gives(embedder: Embedder) -> None:
    """A generator's parts, joined, are the vectors of one call, in order."""
    texts = [f"line {index} " + "x " * (index % 9) for index in range(250)]
    parts = list(embedder.embed_iter((text for text in texts), window=64))
    assert [len(part) for part in parts] == [64, 64, 64, 58]
    joined = np.concatenate([part.vectors for part in parts])
    assert vectors.cosine(joined, embedder.embed(texts).vectors).min() >= 0.9999
