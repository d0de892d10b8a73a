"""From inputs to embeddings: make rows, run the model, truncate and normalise.

An input is a text with its prompt in front, a pair of texts, or the pixels of an image,
`[3, height, width]` uint8.

- Triton's `embedder` backend and the client's in-process provider use `SharedEngine`: requests of
  many callers run together.
- The build's check uses `Engine`: one caller, in its own thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halimede_engine import batching, memory, session
from halimede_engine.response_cache import Entry, ResponseCache, characters
from halimede_engine.session import Pixels, Row, Session
from halimede_ops import heads, spans, sparse, vectors
from halimede_ops.spans import Spanned
from halimede_ops.spec import (
    MULTI_VECTOR,
    POOLED,
    POOLED_TOKENS,
    SPARSE_KIND,
    ImageSpec,
    ModelSpec,
)

if TYPE_CHECKING:  # images need no tokenizers
    from halimede_engine.requests import Outcome
    from halimede_engine.scheduler import Scheduler
    from halimede_ops.text import Item, TextTokenizer, Tokens

MakeRows = Callable[[Sequence[Any]], Sequence[Row | Pixels]]
"""Makes one row of each input, in order."""
Outputs = Sequence[Any] | np.ndarray
"""What the model gave for each row, in order."""

LARGE_CHARACTERS = 500_000
"""Texts longer than this, as a tokenizer gets them, are tokenized one at a time, and the memory is
returned: 1 MB takes up to 400 MB while it is tokenized."""
_LARGE_TEXT_LOCK = threading.Lock()


def text_bytes(item: Item) -> int:
    """Size of a text, or of both texts of a pair, in bytes of UTF-8."""
    if isinstance(item, Spanned):
        return text_bytes(item.text)
    if isinstance(item, tuple):
        return sum(map(text_bytes, item))
    return len(item) if item.isascii() else len(item.encode("utf-8", "surrogatepass"))


def text_rows(
    tokenizer: TextTokenizer, on_tokens: Callable[[Sequence[Tokens]], None] = lambda tokens: None
) -> MakeRows:
    """A function that tokenizes texts, or pairs of texts, with their prompts in front; `on_tokens`
    gets the tokens.
    """

    def make_rows(prompted: Sequence[Item]) -> list[Row]:
        if max(map(characters, prompted), default=0) > LARGE_CHARACTERS:
            with _LARGE_TEXT_LOCK:
                tokens = tokenizer.encode_prompted(prompted)
                memory.trim()
        else:
            tokens = tokenizer.encode_prompted(prompted)
        on_tokens(tokens)
        return session.token_rows(tokens)

    return make_rows


def image_rows(spec: ImageSpec) -> MakeRows:
    """A function that makes rows of the pixels of images, `[3, height, width]` uint8."""
    return lambda images: session.pixel_rows(images, spec.positions)


class Embeddings(NamedTuple):
    """The embeddings of one request."""

    vectors: np.ndarray
    """`[inputs, dimensions]` float32; `[inputs, 0]` of a sparse model. Of a late-interaction model
    they are the vectors of the first tokens."""
    tokens: np.ndarray
    """Tokens of each whole input, those beyond the model's limit included: `[inputs]` int32."""
    heads: dict[str, np.ndarray]
    """Further outputs of the model, by name: see `halimede_ops.heads.outputs`; for a sparse model
    `halimede_ops.sparse.outputs`, for a late-interaction model `halimede_ops.heads.late`, for one
    built for late chunking also `halimede_ops.spans.outputs`."""


class Engine:
    """A model for one caller, in the caller's own thread."""

    def __init__(self, session: Session, make_rows: MakeRows, spec: ModelSpec) -> None:
        self.session = session
        self.spec = spec
        self._make_rows = make_rows

    def rows(self, inputs: Sequence[Any]) -> Sequence[Row | Pixels]:
        """Make one row of each input, in order."""
        return self._make_rows(inputs)

    def embed(self, inputs: Sequence[Any]) -> np.ndarray:
        """Embeddings `[len(inputs), dims]` float32, in order.

        Raises:
            NonFiniteVector: the model gives NaN or infinity for an input.
        """
        return vectors.embed(self.session.run(self.rows(inputs)), self.spec)


class SharedEngine:
    """A model for many callers: their inputs run together. Safe to call from several threads."""

    def __init__(
        self, scheduler: Scheduler, spec: ModelSpec, cache: ResponseCache | None = None
    ) -> None:
        """An engine over a scheduler whose `make_rows` takes the engine's inputs.

        `cache` keeps the vectors of texts. It must be None for a model with heads: their outputs
        are as large as their texts are long, and are not cached.
        """
        self._scheduler = scheduler
        self._spec = spec
        self._cache = cache
        # The garbage collector may run in a thread of the scheduler, or in one that holds its lock.
        weakref.finalize(self, scheduler.stop).atexit = False  # atexit handlers may still embed

    def submit(
        self,
        inputs: Sequence[Any],
        dimensions: int | None,
        answer: Callable[[Embeddings | Exception], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Embed the inputs of one request; return how many of them the cache answered.

        `answer` is called once, perhaps in another thread, with the embeddings or with the
        exception that the request ended with. `is_cancelled` is as in `Scheduler.submit`.

        Raises:
            ServerOverloaded: too many requests are unanswered; `answer` is not called.
            RequestCancelled: the engine is closed; `answer` is not called.
        """
        cached, missing = self._cached(inputs)
        stored = missing if self._cache is not None else ()  # else the texts can go before the end

        def finish(outcome: Outcome) -> None:
            if isinstance(outcome, Exception):
                answer(outcome)
                return
            rows, outputs = [one.row for one in outcome], [one.output for one in outcome]
            try:
                embeddings = self._embeddings(cached, rows, outputs, dimensions)
            except Exception as error:  # perhaps of a vector that must not be stored
                answer(error)
            else:
                answer(embeddings)
                self._store(stored, rows, outputs)

        if missing:
            self._scheduler.submit(missing, finish, is_cancelled)
        else:
            finish([])
        return len(inputs) - len(missing)

    def embed_now(self, inputs: Sequence[Any], dimensions: int | None) -> Embeddings | None:
        """Embed a few inputs in the caller's thread if the engine is idle, else return None.

        None means that `submit` runs them together with those of other callers.

        Raises:
            InvalidDimensions: the model has no vectors of this length.
            InvalidText: an input has no token.
            NonFiniteVector: the model gives NaN or infinity for an input.
            Exception: what the run raised.
        """
        cached, missing = self._cached(inputs)
        done = self._scheduler.run_now(missing) if missing else ([], [])
        if done is None:
            return None
        rows, outputs = done
        if self._cache is None and isinstance(outputs, np.ndarray):  # the fastest way for a text
            tokens = self._tokens([row.total for row in rows])
            return Embeddings(vectors.embed(outputs, self._spec, dimensions), tokens, {})
        embeddings = self._embeddings(cached, rows, outputs, dimensions)
        self._store(missing, rows, outputs)
        return embeddings

    def gather(self) -> None:
        """Wait briefly for more requests while all threads are busy: see `Scheduler.gather`."""
        self._scheduler.gather()

    def close(self) -> None:
        """Answer all requests, then stop the threads. An engine that is dropped does so too."""
        self._scheduler.close()

    def _cached(self, inputs: Sequence[Any]) -> tuple[Sequence[Entry | None], Sequence[Any]]:
        """The cached entry of each input, None where there is none, and the inputs without one."""
        if self._cache is None:
            return [None] * len(inputs), inputs
        entries = self._cache.get(inputs)
        return entries, [given for given, entry in zip(inputs, entries, strict=True) if not entry]

    def _store(self, missing: Sequence[Any], rows: Sequence[Any], outputs: Outputs) -> None:
        if self._cache is not None:
            self._cache.put(missing, _entries(rows, outputs))

    def _embeddings(
        self,
        cached: Sequence[Entry | None],
        rows: Sequence[Any],
        outputs: Outputs,
        dimensions: int | None,
    ) -> Embeddings:
        computed = iter(_entries(rows, outputs))
        entries = [entry or next(computed) for entry in cached]
        given: list[Any] = [entry.vector for entry in entries]
        tokens = self._tokens([entry.tokens for entry in entries])
        if self._spec.kind == SPARSE_KIND:
            return Embeddings(np.empty((len(given), 0), np.float32), tokens, sparse.outputs(given))
        stacked = session.stack_outputs(given)
        pooled = stacked.pop(POOLED)
        embedded = vectors.embed(pooled, self._spec, dimensions)
        further: dict[str, np.ndarray] = {}
        if POOLED_TOKENS in stacked:
            spans.check_whole(tokens.tolist(), [row.spans for row in rows], self._spec)
            further = spans.outputs(stacked.pop(POOLED_TOKENS), self._spec, dimensions)
        return Embeddings(embedded, tokens, further | self._heads(stacked, rows))

    def _tokens(self, totals: Sequence[int]) -> np.ndarray:
        """The tokens of each input: `[inputs]` int32.

        Raises:
            InvalidText: an input has none, and the model has no vector for that.
        """
        vectors.check_tokens(totals, self._spec)
        return np.array(totals, np.int32)

    def _heads(self, outputs: dict[str, np.ndarray], rows: Sequence[Row]) -> dict[str, np.ndarray]:
        if not outputs:
            return {}
        lengths = [row.length for row in rows]
        longest = max(lengths)
        if self._spec.late is not None:
            kept = batching.pad([row.kept for row in rows if row.kept is not None], longest)
            return heads.late(outputs[MULTI_VECTOR], kept)
        ids = batching.pad([row.ids for row in rows], longest)
        return heads.outputs(outputs, ids, batching.mask(lengths, longest), self._spec)


def _entries(rows: Sequence[Any], outputs: Outputs) -> list[Entry]:
    # For a model with heads, `vector` is a dict of all outputs: see `stack_outputs`.
    return [Entry(output, row.total) for row, output in zip(rows, outputs, strict=True)]
