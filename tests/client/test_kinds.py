"""Rerankers, classifiers, sparse outputs and multi-vectors: what their calls give and refuse."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halimede import (
    AsyncClassifier,
    AsyncEmbedder,
    AsyncReranker,
    Classifier,
    DeadlineExceeded,
    Embedder,
    Future,
    InvalidInput,
    InvalidText,
    NonFiniteVector,
    Ranked,
    Request,
    Reranker,
    ServerError,
    ServerUnreachable,
    SpaceRefused,
    UnsupportedInput,
    maxsim,
)
from halimede.embedder import BaseClient
from halimede.inputs.content import ModelKind, TextPair
from halimede.pipeline.batching import plan_requests
from halimede.providers.base import Answer, ragged
from halimede.results import Result
from halimede.testing import FakeProvider

QUERY = "red fox"
DOCUMENTS = ["a blue whale", "the red fox", "a red house", "another red house", "a fox red"]
CONFIG = {"cache": {}, "models": {"only": {"provider": "hash"}}}

CALLS: dict[str, tuple[type[BaseClient], ModelKind, Callable[[Any], Any]]] = {
    "rank": (Reranker, "reranker", lambda client: client.rank(QUERY, DOCUMENTS)),
    "score": (Reranker, "reranker", lambda client: client.score([(QUERY, d) for d in DOCUMENTS])),
    "classify": (Classifier, "classifier", lambda client: client.classify(DOCUMENTS)),
    "classify pairs": (
        Classifier,
        "classifier",
        lambda client: client.classify(DOCUMENTS, DOCUMENTS[::-1]),
    ),
    "embed_sparse": (Embedder, "sparse", lambda client: client.embed_sparse(DOCUMENTS)),
    "embed_multi": (Embedder, "late_interaction", lambda client: client.embed_multi(DOCUMENTS)),
    "embed": (Embedder, "dense", lambda client: client.embed(DOCUMENTS)),
}
"""Call → class, kind of model, and the call."""


def rows(result: Result) -> list[list[np.ndarray]]:
    """The arrays of each row of a result."""
    names = ("vectors", "scores", "ids", "weights")
    arrays = [getattr(result, name) for name in names if hasattr(result, name)]
    return [[np.asarray(array[row]) for array in arrays] for row in range(len(result))]


def assert_equal(one: Result, other: Result) -> None:
    assert type(one) is type(other)
    for a, b in zip(rows(one), rows(other), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert one.indices.tolist() == other.indices.tolist()


def test_documents_are_ranked() -> None:
    """The best first, equal ones in their order; `top_k` cuts off; documents come if asked."""
    with Reranker(providers=[FakeProvider(kind="reranker")]) as reranker:
        ranking = reranker.rank(QUERY, DOCUMENTS)
        assert ranking.indices.tolist() == [1, 4, 2, 3, 0]
        assert ranking.scores.tolist() == [1, 1, 0.5, 0.5, 0]
        assert ranking.scores.dtype == np.float32
        assert list(ranking)[:2] == [Ranked(1, 1.0), Ranked(4, 1.0)]
        assert ranking.documents is None
        best = reranker.rank(QUERY, iter(DOCUMENTS), top_k=2, return_documents=True)
        assert best[0] == Ranked(1, 1.0, "the red fox")
        assert (len(best), best.documents) == (2, ("the red fox", "a fox red"))
        assert best.tokens.tolist() == [5, 5]  # of query and document
        assert len(reranker.rank(QUERY, [], top_k=3)) == 0
        assert reranker.score([(QUERY, DOCUMENTS[2]), (QUERY, DOCUMENTS[0])]).scores.tolist() == [
            0.5,
            0,
        ]


def test_texts_are_classified() -> None:
    """One score for each label, and the best label; a second text is another input."""
    fake = FakeProvider(kind="classifier", labels=("no", "yes", "perhaps"))
    with Classifier(providers=[fake]) as classifier:
        result = classifier.classify(DOCUMENTS)
        assert result.scores.shape == (5, 3)
        assert result.labels == ("no", "yes", "perhaps")
        assert result.best == tuple(result.labels[row.argmax()] for row in result.scores)
        pairs = classifier.classify(DOCUMENTS, pairs=DOCUMENTS)
        assert TextPair(b"the red fox", b"the red fox") in fake.requests[-1].inputs
        assert not np.array_equal(pairs.scores, result.scores)
        with pytest.raises(InvalidInput, match="5 texts and 1 second texts"):
            classifier.classify(DOCUMENTS, pairs=["one"])


def test_sparse_outputs_and_multi_vectors() -> None:
    """Rows of any length, in order; `maxsim` compares multi-vectors as they are."""
    with Embedder(providers=[FakeProvider()]) as embedder:
        sparse = embedder.embed_sparse(["a b a", "", "c"], input_type="document")
        assert [ids.dtype == np.int32 for ids in sparse.ids] == [True] * 3
        assert [len(ids) for ids in sparse.ids] == [2, 0, 1]
        assert sorted(sparse.weights[0].tolist()) == [1, 2]
        multi = embedder.embed_multi([*DOCUMENTS, ""])
        assert [vectors.shape for vectors in multi.vectors] == [(3, 384)] * 5 + [(0, 384)]
        query = embedder.embed_multi(QUERY).vectors[0]
        best, scores = maxsim.rank(query, multi.vectors, top_k=2)
        assert best.tolist() == [1, 4]
        np.testing.assert_allclose(scores, 2, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_both_classes_give_the_same(name: str) -> None:
    """The asyncio class and a pickled copy give what the blocking class gives."""
    cls, kind, call = CALLS[name]
    other = {Reranker: AsyncReranker, Classifier: AsyncClassifier, Embedder: AsyncEmbedder}[cls]

    async def asked() -> Any:
        async with other(providers=[FakeProvider(kind=kind)]) as client:
            return await call(client)

    with cls(providers=[FakeProvider(kind=kind)]) as client:
        result = call(client)
    assert_equal(result, asyncio.run(asked()))


def test_the_models_name_comes_first() -> None:
    """As the first argument or by name, and with the arguments of an embedder; so in a copy."""
    for reranker in (Reranker("only", config=CONFIG), Reranker(model="only", config=CONFIG)):
        with reranker, pickle.loads(pickle.dumps(reranker)) as copy:
            assert [one.config.chain()[0].provider for one in (reranker, copy)] == ["hash"] * 2
    with Classifier("m", url="127.0.0.1:1", timeout_s=3) as classifier:
        [options] = classifier.config.chain()
        assert (options.model_id, options.timeout_s) == ("m", 3)
        assert options.url == ("127.0.0.1:1",)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["dense", "reranker", "classifier", "sparse", "late_interaction"])
def test_a_model_of_another_kind_is_refused(name: str, kind: ModelKind) -> None:
    """The error says what the model is and what to call instead."""
    cls, own, call = CALLS[name]
    fake = FakeProvider(kind=kind)
    with cls(providers=[fake]) as client:
        if kind == own or (kind == "dense" and cls is Embedder):
            assert len(call(client)) == len(DOCUMENTS)
            return
        with pytest.raises(UnsupportedInput) as raised:
            call(client)
    words = {
        "dense": ("a dense embedding model", "Embedder.embed"),
        "reranker": ("a reranker", "Reranker.rank"),
        "classifier": ("a classifier", "Classifier.classify"),
        "sparse": ("a sparse embedding model", "Embedder.embed_sparse"),
        "late_interaction": ("a late-interaction model", "Embedder.embed_multi"),
    }[kind]
    assert all(word in str(raised.value) for word in words)
    assert not fake.requests


@pytest.mark.parametrize("provider", ["hash"])
def test_a_provider_of_vectors_is_no_reranker(provider: str) -> None:
    """A provider that knows no other kinds is refused by what it describes."""
    with (
        Reranker("only", config={"models": {"only": {"provider": provider}}}) as reranker,
        pytest.raises(UnsupportedInput, match=r"is a dense embedding model; rank needs a reranker"),
    ):
        reranker.rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize("name", CALLS)
def test_every_output_is_cached(name: str, tmp_path: Path) -> None:
    """A second call gives the same rows from the cache; a new document alone is asked for."""
    cls, kind, call = CALLS[name]
    fake = FakeProvider(kind=kind)
    disk = {"disk": {"path": str(tmp_path)}}
    with cls(providers=[fake], config=CONFIG | {"cache": disk}) as client:
        first, second = call(client), call(client)
        assert_equal(first, second)
        assert (first.cached.any(), second.cached.all()) == (False, True)
        assert first.tokens.tolist() == second.tokens.tolist()
        assert sum(len(request.inputs) for request in fake.requests) == len(DOCUMENTS)
    again = FakeProvider(kind=kind)
    with cls(providers=[again], config=CONFIG | {"cache": disk | {"memory_mb": None}}) as client:
        assert_equal(first, call(client))
    assert not again.requests


def test_outputs_of_one_text_have_entries_of_their_own() -> None:
    """A model that gives three outputs of a text is asked for each."""
    fake = FakeProvider()
    with Embedder(providers=[fake], config=CONFIG) as embedder:
        for _ in range(2):
            embedder.embed("a")
            embedder.embed_sparse("a")
            embedder.embed_multi("a")
    assert [request.output for request in fake.requests] == ["vector", "sparse", "multi"]


@pytest.mark.parametrize("name", CALLS)
def test_a_fallback_answers_the_whole_call(name: str) -> None:
    """In one space; a model of another space is refused, as for vectors."""
    cls, kind, call = CALLS[name]
    first, second = FakeProvider("first", kind=kind), FakeProvider("second", kind=kind)
    with cls(providers=[first, second]) as client:
        expected = call(client)
        with first.down(ServerUnreachable("down")):
            result = call(client)
            assert_equal(expected, result)
            assert result.model == "second"
            second.change_model("b" * 16)
            with pytest.raises((SpaceRefused, ServerUnreachable)):
                call(client)


@pytest.mark.parametrize("name", CALLS)
def test_requests_are_cut_and_joined_in_order(name: str) -> None:
    """Whatever the requests, each row is that of its input alone."""
    cls, kind, call = CALLS[name]
    small = FakeProvider(kind=kind, max_batch_size=2)
    with cls(providers=[FakeProvider(kind=kind)]) as one, cls(providers=[small]) as many:
        assert_equal(call(one), call(many))
    assert len(small.requests) == 3


class Changed(FakeProvider):
    """Answers with other vectors."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray], **options: Any) -> None:
        super().__init__(**options)
        self.change = change

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        answer = super().embed(request, timeout_s).result()
        changed: ConcurrentFuture[Answer] = ConcurrentFuture()
        changed.set_result(answer._replace(vectors=self.change(answer.vectors)))
        return changed


def poisoned(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.copy()
    vectors[1] = vectors[1] * np.float32("nan")
    return vectors


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_finite_is_refused(name: str) -> None:
    """By the index of its input, and never cached."""
    cls, kind, call = CALLS[name]
    fake = Changed(poisoned, kind=kind)
    with cls(providers=[fake], config=CONFIG) as client:
        for _ in range(2):
            with pytest.raises(NonFiniteVector, match="has no vector") as raised:
                call(client)
            texts = [d.encode() for d in DOCUMENTS]
            second = fake.requests[-1].inputs[1]  # longest first
            given = {
                "classify pairs": list(map(TextPair, texts, texts[::-1])),
                "rank": [TextPair(QUERY.encode(), text) for text in texts],
                "score": [TextPair(QUERY.encode(), text) for text in texts],
            }.get(name, texts)
            assert raised.value.index == given.index(second)


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_of_other_shapes_is_refused(name: str) -> None:
    """Fewer rows, or rows of another kind."""
    cls, kind, call = CALLS[name]
    for change in (
        lambda vectors: vectors[:-1],
        lambda vectors: ragged([np.zeros(3, np.float32)] * len(vectors)),
    ):
        with cls(providers=[Changed(change, kind=kind)]) as client, pytest.raises(ServerError):
            call(client)


@pytest.mark.parametrize("name", CALLS)
def test_a_canary_answers_its_share(name: str) -> None:
    """Of the inputs, in one space; one with other labels answers nothing."""
    cls, kind, call = CALLS[name]
    fake = FakeProvider(kind=kind)
    served = fake.describe(1).result()
    candidate = dataclasses.replace(served, name="fake--candidate", version="7", share=1.0)
    asked: list[str] = []

    class Both(FakeProvider):
        def describe(self, timeout_s: float, kind: Any = None) -> Any:
            model = super().describe(timeout_s, kind).result()
            future: ConcurrentFuture[Any] = ConcurrentFuture()
            future.set_result(
                dataclasses.replace(
                    model, candidate=dataclasses.replace(candidate, input=model.input)
                )
            )
            return future

        def embed(self, request: Request, timeout_s: float) -> Any:
            assert request.model is not None
            asked.append(request.model.name)
            answer = super().embed(request, timeout_s).result()
            future: ConcurrentFuture[Answer] = ConcurrentFuture()
            future.set_result(answer._replace(model=request.model))
            return future

    with cls(providers=[Both(kind=kind)]) as client:
        result = call(client)
    assert set(asked) == {"fake--candidate"}
    assert result.versions.tolist() == [7] * len(DOCUMENTS)
    candidate = dataclasses.replace(candidate, labels=("other",))
    asked.clear()
    with cls(providers=[Both(kind=kind)]) as client:
        call(client)
    assert set(asked) == {"fake"}


def test_pairs_are_planned_by_both_lengths() -> None:
    """A long query makes long pairs: a request has as many bytes as texts would."""
    pairs = [TextPair(b"q" * 4000, b"d" * (4 * length)) for length in range(100)]
    plan = plan_requests(pairs, 256, 10_000)
    texts = plan_requests([b"".join(pair) for pair in pairs], 256, 10_000)
    assert plan == texts
    assert len(plan) > 1


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [
        (7, ["a"], "query is int"),
        ("a\ud800", ["a"], "query .*surrogate"),
        ("a", ["a", None], "text 1 is NoneType"),
        ("a", "a single text", "documents is a single str"),
        ("a", {"a", "b"}, "documents is set"),
    ],
)
def test_a_wrong_query_or_document_is_named(query: Any, documents: Any, message: str) -> None:
    """The message has no text in it."""
    with (
        Reranker(providers=[FakeProvider(kind="reranker")]) as reranker,
        pytest.raises((InvalidInput, InvalidText), match=message),
    ):
        reranker.rank(query, documents)


def test_wrong_arguments_are_named() -> None:
    """Pairs that are none, and counts that are none."""
    with Reranker(providers=[FakeProvider(kind="reranker")]) as reranker:
        for top_k in (0, -1, 1.5, True, "3"):
            with pytest.raises(InvalidInput, match="^top_k is "):
                reranker.rank(QUERY, DOCUMENTS, top_k=top_k)  # type: ignore[arg-type]
        for pairs in (["ab"], [("a",)], [("a", "b", "c")], [3]):
            with pytest.raises(InvalidInput, match=r"^pair 0 is .*\(query, document\)"):
                reranker.score(pairs)  # type: ignore[arg-type]
        with pytest.raises(InvalidText, match="1 is int"):
            reranker.score([("a", "b"), ("a", 3)])  # type: ignore[list-item]


def test_statistics_count_text_pairs() -> None:
    """Beside texts and images, for calls and for providers."""
    with Reranker(providers=[FakeProvider(kind="reranker")]) as reranker:
        reranker.rank(QUERY, DOCUMENTS)
        stats = reranker.stats()
        assert reranker.health()[0]["healthy"]
    assert (stats["texts"], stats["text_pairs"]) == (0, len(DOCUMENTS))
    assert stats["providers"]["fake"]["text_pairs"] == len(DOCUMENTS)


def test_a_deadline_says_what_was_not_done() -> None:
    """Text pairs are scored, texts are embedded."""
    for name, words in (
        ("rank", "5 text pairs were not scored within 0.05 s"),
        ("embed_multi", "5 texts were not embedded within 0.05 s"),
    ):
        cls, kind, call = CALLS[name]
        with cls(providers=[FakeProvider(kind=kind, latency_s=5)], deadline_s=0.05) as client:
            with pytest.raises(DeadlineExceeded, match=words):
                call(client)
