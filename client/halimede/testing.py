"""A provider for the tests of programs that embed or score: no model, no server, failures on
demand.

    fake = FakeProvider()
    with Embedder(providers=[fake]) as embedder:
        fake.fail(ServerOverloaded("busy"))
        result = embedder.embed("hello")  # the second attempt is answered
    assert fake.requests[0].inputs == [b"hello"]

The vectors are hash embeddings: equal inputs have equal vectors, different ones are about
orthogonal, and the same text has the same vector everywhere. A word is a token: it has the same id
and the same vector in every text. A reranker's score is the share of the query's words that the
document has, and a classifier's scores are the hash of the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future as ConcurrentFuture

import numpy as np

from halimede.inputs.content import (
    OUTPUT_OF,
    Content,
    InputKind,
    ModelKind,
    TextPair,
    serialise,
)
from halimede.pipeline.sharing import completed
from halimede.pipeline.waiting import Future
from halimede.providers.answers import truncate
from halimede.providers.base import Answer, Request, ragged
from halimede.providers.hash import hash_embeddings
from halimede.results import ServedModel
from halimede_ops.errors import HalimedeError

__all__ = ["FakeProvider"]

DIMS = 384
VOCABULARY = 30_522
"""Token ids of a fake's sparse outputs are below it."""


class FakeProvider:
    """A provider that answers at once, or fails as it is told to. Safe to use from several threads.

    Args:
        name: name in results and errors.
        dims: length of a vector, 384 to 3072; with `vectors`, their length.
        space: space of its vectors. Two fakes that may stand in for each other have the same.
        precision: precision of its vectors.
        max_tokens: token limit of a text. Each word counts as one token.
        max_batch_size: maximum inputs in one request.
        latency_s: seconds until a request is answered.
        vectors: vectors `[dims]` of some texts. Every other text has its hash embedding.
        kind: what it is. A dense fake gives sparse outputs and multi-vectors too.
        labels: labels of a classifier.
        scores: scores of some pairs `(query, document)` of a reranker.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        dims: int = DIMS,
        space: str = "fake",
        precision: str = "fp32",
        max_tokens: int = 512,
        max_batch_size: int = 64,
        latency_s: float = 0.0,
        vectors: Mapping[str, Sequence[float]] | None = None,
        kind: ModelKind = "dense",
        labels: Sequence[str] = ("negative", "positive"),
        scores: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self.name = name
        self.latency_s = latency_s
        self.requests: list[Request] = []
        """Every request so far, failed ones included."""
        self.is_closed = False
        self._vectors = {
            text.encode(): np.asarray(vector, np.float32)
            for text, vector in (vectors or {}).items()
        }
        self._scores = {
            TextPair(query.encode(), document.encode()): score
            for (query, document), score in (scores or {}).items()
        }
        if self._vectors:
            dims = len(next(iter(self._vectors.values())))
        dims = {"reranker": 1, "classifier": len(labels), "sparse": VOCABULARY}.get(kind, dims)
        self._model = ServedModel(
            name=name,
            space=space,
            precision=precision,
            dims=dims,
            max_tokens=max_tokens,
            max_batch_size=max_batch_size,
            provider="fake",
            kind=kind,
            outputs=("vector", "sparse", "multi") if kind == "dense" else (OUTPUT_OF[kind],),
            labels=tuple(labels) if kind == "classifier" else (),
        )
        self._lock = threading.Lock()
        self._failures: deque[HalimedeError] = deque()
        self._down: HalimedeError | None = None

    def fail(self, *errors: HalimedeError) -> None:
        """Let the next requests fail, each with one of these errors, in their order."""
        with self._lock:
            self._failures.extend(errors)

    @contextlib.contextmanager
    def down(self, error: HalimedeError) -> Iterator[None]:
        """Let every request and every description fail with this error within a `with` block."""
        self._down = error
        try:
            yield
        finally:
            self._down = None

    def change_model(self, space: str, **facts: object) -> None:
        """Serve another model from now on, with this space and these facts of `ServedModel`."""
        self._model = dataclasses.replace(self._model, space=space, **facts)  # type: ignore[arg-type]

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Return the model. It takes every kind of inputs."""
        if self._down is not None:
            raise self._down
        own: InputKind = "text_pair" if self._model.kind == "reranker" else "text"
        return completed(dataclasses.replace(self._model, input=kind or own))

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Answer a request, or fail."""
        with self._lock:
            self.requests.append(request)
            failure = self._down or (self._failures.popleft() if self._failures else None)
        if failure is not None:
            raise failure
        if not self.latency_s:
            return completed(self._answer(request))
        return _later(self.latency_s, lambda: self._answer(request))

    def close(self) -> None:
        """Note that it was closed."""
        self.is_closed = True

    def _answer(self, request: Request) -> Answer:
        model = dataclasses.replace(self._model, input=request.kind)
        answer = {"scores": self._score, "sparse": self._sparse, "multi": self._multi}
        if request.output == "vector":
            vectors = np.stack([self._vector(content) for content in request.inputs])
            vectors = truncate(vectors, request.dimensions)
        else:
            rows = [answer[request.output](content) for content in request.inputs]
            vectors = np.stack(rows) if request.output == "scores" else ragged(rows)
        words = [len(_words(content)) for content in request.inputs]
        return Answer(vectors, np.array(words, np.int32), model)

    def _score(self, content: Content) -> np.ndarray:
        if self._model.kind == "classifier":
            [hashed] = hash_embeddings([serialise(content)])
            return hashed[: self._model.dims]
        assert isinstance(content, TextPair)
        query, document = content.first.split(), set(content.second.split())
        share = sum(word in document for word in query) / max(len(query), 1)
        return np.array([self._scores.get(content, share)], np.float32)

    def _sparse(self, content: Content) -> np.ndarray:
        counts = Counter(zlib.crc32(word) % VOCABULARY for word in _words(content))
        return np.array(sorted(counts.items()), np.float32).reshape(-1, 2).T

    def _multi(self, content: Content) -> np.ndarray:
        vectors = [self._vector(word) for word in _words(content)]
        return np.array(vectors, np.float32).reshape(-1, self._model.dims)

    def _vector(self, content: Content) -> np.ndarray:
        known = self._vectors.get(content) if isinstance(content, bytes) else None
        if known is not None:
            return known
        dims = self._model.dims
        vector = hash_embeddings([serialise(content)], max(dims, DIMS))[0, :dims]
        return vector / np.linalg.norm(vector)


def _words(content: Content) -> list[bytes]:
    """The words of a text, or of both texts of a pair."""
    return b" ".join(content if isinstance(content, TextPair) else [serialise(content)]).split()


def _later(seconds: float, compute: Callable[[], Answer]) -> Future[Answer]:
    """The future of an answer that is there after some seconds."""
    future: ConcurrentFuture[Answer] = ConcurrentFuture()

    def finish() -> None:
        if future.set_running_or_notify_cancel():
            future.set_result(compute())

    timer = threading.Timer(seconds, finish)
    timer.daemon = True
    timer.start()
    return future
