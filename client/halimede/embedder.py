"""The client: texts to labelled embeddings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from halimede.results import Embeddings, ServedModel
from halimede.settings import Settings
from halimede.triton import Answer, Triton, Wait
from halimede_ops.errors import InvalidDimensions, InvalidText

REQUESTS_IN_FLIGHT = 4
"""Requests of one call that are on their way at once: the server's steps overlap."""
REQUEST_BYTES = 8 * 1024 * 1024
"""Most bytes of text in one request."""


class Embedder:
    """Embeds texts with one model of one server. Safe to use from several threads.

    >>> with Embedder("127.0.0.1:8001") as embedder:
    ...     result = embedder.embed(["hello world"])
    """

    def __init__(
        self, url: str | None = None, model: str | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Connect lazily: the first call that needs the server opens the connection.

        Args:
            url: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP.
                Default: `HALIMEDE_URL`, else 127.0.0.1:8001.
            model: name of the served model. Default: `HALIMEDE_MODEL`, else all-MiniLM-L6-v2.
            timeout_s: longest wait for one request. Default: `HALIMEDE_TIMEOUT_S`, else 30.
        """
        given: dict[str, Any] = {"url": url, "model": model, "timeout_s": timeout_s}
        settings = Settings(**{key: value for key, value in given.items() if value is not None})
        self.model_name = settings.model
        self._triton = Triton(settings.url, settings.timeout_s)
        self._model: ServedModel | None = None

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        self._triton.close()

    @property
    def model(self) -> ServedModel:
        """The model as the server describes it; asked once."""
        if self._model is None:
            self._model = self._triton.describe(self.model_name)
        return self._model

    def embed(
        self,
        texts: Sequence[str] | str,
        *,
        input_type: str | None = None,
        dimensions: int | None = None,
    ) -> Embeddings:
        """Embeddings of the texts, in their order: vectors `[texts, dims]` float32.

        One string is one text. Any number of texts is taken: they are sent in requests of at
        most the model's `max_batch_size`. An empty text is embedded as sentence-transformers
        embeds it; a text beyond the model's token limit is cut off, and `truncated` says so.

        Args:
            texts: the texts.
            input_type: `query`, `document` or the name of another prompt of the model.
            dimensions: keep this many leading components (Matryoshka), normalised again.

        Raises:
            InvalidText: an item is not a string or cannot be encoded as UTF-8.
            UnknownInputType: the model has no such prompt.
            InvalidDimensions: `dimensions` is outside 1 … the model's dims.
            ModelNotFound: the server does not have the model.
            ServerError: the server is not there, is overloaded, or did not answer in time.
        """
        encoded = encode([texts] if isinstance(texts, str) else texts)
        model = self.model
        dims = model.dims if dimensions is None else dimensions
        if not 1 <= dims <= model.dims:
            raise InvalidDimensions(f"dimensions is {dims}; {model.name} gives 1 to {model.dims}.")
        answers = list(self._answers(encoded, model, input_type, dimensions))
        return Embeddings(
            vectors=_joined([answer.vectors for answer in answers], (0, dims), np.float32),
            tokens=_joined([answer.tokens for answer in answers], (0,), np.int32),
            model=model.name,
            space=model.space,
            precision=model.precision,
            max_tokens=model.max_tokens,
        )

    def _answers(
        self,
        texts: Sequence[bytes],
        model: ServedModel,
        input_type: str | None,
        dimensions: int | None,
    ) -> Iterator[Answer]:
        """Each request's answer in order, with a few requests on their way at once."""
        waiting: deque[Wait] = deque()
        for request in split(texts, model.max_batch_size):
            if len(waiting) == REQUESTS_IN_FLIGHT:
                yield waiting.popleft()()
            waiting.append(self._triton.send(model.name, request, input_type, dimensions))
        while waiting:
            yield waiting.popleft()()


def encode(texts: Sequence[str]) -> list[bytes]:
    """The texts in UTF-8.

    Raises:
        InvalidText: an item is not a string, or has a lone surrogate.
    """
    encoded = []
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidText(f"text {row} is {type(text).__name__}; give a str.")
        try:
            encoded.append(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise InvalidText(
                f"text {row} has a lone surrogate, which UTF-8 cannot hold. "
                "Decode it with errors='replace'."
            ) from None
    return encoded


def split(texts: Sequence[bytes], most: int) -> Iterator[list[bytes]]:
    """Consecutive texts in requests of at most `most` texts and REQUEST_BYTES bytes."""
    request: list[bytes] = []
    size_bytes = 0
    for text in texts:
        if request and (len(request) == most or size_bytes + len(text) > REQUEST_BYTES):
            yield request
            request, size_bytes = [], 0
        request.append(text)
        size_bytes += len(text)
    if request:
        yield request


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(empty, dtype)
