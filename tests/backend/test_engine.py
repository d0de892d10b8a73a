"""Tokenize, run, embed: for one caller, and for many."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, POISON, version_folder, wait_until

from halimede_engine.engine import Embeddings, Engine, SharedEngine, text_rows
from halimede_engine.response_cache import ResponseCache
from halimede_engine.scheduler import Scheduler
from halimede_engine.session import FILE_NAME, Session, open_session
from halimede_ops import spec, text, vectors
from halimede_ops.errors import InvalidDimensions, NonFiniteVector
from halimede_tools.settings import Settings

TOKENIZER = version_folder(Settings().repository / f"{MODEL}-tokenizer")
SPEC = spec.load(TOKENIZER)
TEXTS = ["a cat", "word " * 300, "", "一只猫", "a cat"]
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def tokenizer() -> text.TextTokenizer:
    return text.load(TOKENIZER, SPEC)


@pytest.fixture(scope="module")
def session() -> Session:
    path = version_folder(Settings().repository / f"{MODEL}-onnx") / FILE_NAME
    return open_session(path, max_tokens=SPEC.max_tokens)[0]


@pytest.fixture
def shared(tokenizer: text.TextTokenizer, session: Session) -> Iterator[SharedEngine]:
    """With a cache that holds all texts of a test."""
    scheduler = Scheduler(
        session.run_together, session.plan, threads=1, make_rows=text_rows(tokenizer)
    )
    engine = SharedEngine(scheduler, SPEC, ResponseCache(1_000_000))
    yield engine
    engine.close()


def embed(
    engine: SharedEngine, texts: list[str], dimensions: int | None = None
) -> tuple[Embeddings | Exception, int]:
    """What the engine answered, and for how many texts the cache did."""
    answers: list[Embeddings | Exception] = []
    answered = threading.Event()

    def answer(result: Embeddings | Exception) -> None:
        answers.append(result)
        answered.set()

    cached = engine.submit(texts, dimensions, answer)
    assert answered.wait(TIMEOUT_S)
    [result] = answers
    return result, cached


def test_one_caller_and_many_get_the_same_embeddings(
    tokenizer: text.TextTokenizer, session: Session, shared: SharedEngine
) -> None:
    """Cosine of at least 0.99999, each text at its place, tokens of the whole text."""
    rows = text_rows(tokenizer)
    expected = Engine(session, rows, SPEC).embed(TEXTS)
    result, _ = embed(shared, TEXTS)
    assert isinstance(result, Embeddings)
    assert result.vectors.dtype == np.float32 and result.tokens.dtype == np.int32
    assert vectors.cosine(result.vectors, expected).min() >= 0.99999
    assert result.tokens.tolist() == [row.total for row in rows(TEXTS)]
    assert result.tokens[1] > SPEC.max_tokens
    assert result.heads == {}


def test_cached_texts_are_answered_among_others(shared: SharedEngine) -> None:
    """Texts that were embedded before are not run again, and every text keeps its place."""
    first, cached = embed(shared, ["b", "d"])
    assert cached == 0
    # An entry is stored after its answer was given: close waits for it.
    shared.close()
    both, cached = embed(shared, ["d", "b"])
    assert cached == 2
    assert isinstance(first, Embeddings) and isinstance(both, Embeddings)
    assert np.array_equal(first.vectors[::-1], both.vectors)
    assert np.array_equal(first.tokens[::-1], both.tokens)


def test_an_error_is_the_answer_to_its_request_alone(shared: SharedEngine) -> None:
    """Dimensions that the model does not have are answered with their error."""
    refused, _ = embed(shared, ["a"], SPEC.dims + 1)
    assert isinstance(refused, InvalidDimensions)
    result, _ = embed(shared, ["a"], 8)
    assert isinstance(result, Embeddings) and result.vectors.shape == (1, 8)


def test_a_vector_that_is_not_finite_is_not_cached(
    poisoned: Path, tokenizer: text.TextTokenizer
) -> None:
    """Nor are the texts of its request. What others asked for is."""
    path = version_folder(poisoned / f"{MODEL}-onnx") / FILE_NAME
    opened, _ = open_session(path, max_tokens=SPEC.max_tokens)
    scheduler = Scheduler(
        opened.run_together, opened.plan, threads=1, make_rows=text_rows(tokenizer)
    )
    engine = SharedEngine(scheduler, SPEC, ResponseCache(1_000_000))
    assert isinstance(embed(engine, ["a cat"])[0], Embeddings)
    for _ in range(2):
        refused, cached = embed(engine, ["a cat", POISON, "a dog"])
        assert isinstance(refused, NonFiniteVector) and refused.index == 1
        assert cached == 1
        with pytest.raises(NonFiniteVector, match="^input 1 "):
            engine.embed_now(["a cat", POISON, "a dog"], None)
    engine.close()


def test_a_lone_caller_gets_what_many_get(
    tokenizer: text.TextTokenizer, session: Session, shared: SharedEngine
) -> None:
    """The caller's own thread gives the same embeddings, and no thread is started."""
    before = threading.active_count()
    expected = Engine(session, text_rows(tokenizer), SPEC).embed(TEXTS)
    cached = shared.embed_now(TEXTS, None)
    assert shared.embed_now([*TEXTS, "new"], None) is not None  # some of them are cached now
    uncached = SharedEngine(
        Scheduler(session.run_together, session.plan, threads=1, make_rows=text_rows(tokenizer)),
        SPEC,
    )
    for result in (cached, uncached.embed_now(TEXTS, None), shared.embed_now(TEXTS, None)):
        assert result is not None
        assert result.vectors.dtype == np.float32 and result.tokens.dtype == np.int32
        assert vectors.cosine(result.vectors, expected).min() >= 0.99999
        assert result.tokens.tolist() == [row.total for row in text_rows(tokenizer)(TEXTS)]
    short = uncached.embed_now(["a"], 8)
    assert short is not None and short.vectors.shape == (1, 8)
    for engine in (shared, uncached):
        with pytest.raises(InvalidDimensions):
            engine.embed_now(["a"], SPEC.dims + 1)
    assert threading.active_count() == before


def test_an_engine_that_is_dropped_ends_its_threads(
    tokenizer: text.TextTokenizer, session: Session
) -> None:
    """Its last reference is the end of its threads and of its scheduler, after the last answer."""
    scheduler = Scheduler(
        session.run_together, session.plan, threads=2, make_rows=text_rows(tokenizer)
    )
    engine = SharedEngine(scheduler, SPEC)
    for _ in range(3):  # the answering thread has had a request too
        assert isinstance(embed(engine, ["a"] * 40)[0], Embeddings)
    threads, reference = [*scheduler._run_threads, scheduler._answer_thread], weakref.ref(scheduler)
    del engine, scheduler
    wait_until(lambda: not any(thread and thread.is_alive() for thread in threads), 5)
    wait_until(lambda: reference() is None, 5)
