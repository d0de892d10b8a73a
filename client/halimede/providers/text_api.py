"""What providers of a text model behind an HTTP API have in common."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede.inputs.content import InputKind
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import completed
from halimede.pipeline.waiting import Future
from halimede.providers.answers import REMOTE_PRECISION, fingerprint, truncate
from halimede.providers.base import Answer, Options, Request
from halimede.providers.input_kinds import check_texts, texts_of
from halimede.providers.prompts import check_input_type
from halimede.results import ServedModel

REQUESTS_IN_FLIGHT = 32


class TextApi(abc.ABC):
    """A text model behind an API. Its SDK's blocking client is called in threads of a pool."""

    _client: Any
    """The SDK's client."""
    is_versioned = False
    """Whether the API reports a version, so that a change of the model can be noticed."""

    def __init__(
        self, options: Options, max_tokens: int, max_batch_size: int, url: str | None = None
    ) -> None:
        """Prepare a provider; `max_tokens` is the limit unless the options give another.

        `url` is the server's, which is part of the space. None: the provider's own.
        """
        self.name = f"{options.provider}:{options.model_id}"
        self._options = options
        self._url = url
        self._max_tokens = options.max_tokens or max_tokens
        self._max_batch_size = max_batch_size
        self._model: ServedModel | None = None
        self._pool = Pool(REQUESTS_IN_FLIGHT, options.provider)

    @abc.abstractmethod
    def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return vectors `[texts, dims]` float32, not necessarily cut, and tokens `[texts]` int32.

        Raises:
            HalimedeError: every failure. An SDK's own error is never raised.
        """

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        self._pool.close()
        close = getattr(self._client, "close", None)
        if close is not None:
            close()

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Start to read the model.

        Raises:
            UnsupportedInput: `kind` is not text.
        """
        check_texts(kind, self.name)
        if self._model is not None and not self.is_versioned:
            return completed(self._model)
        return self._pool.submit(self._describe, timeout_s)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Start to embed a request.

        Raises:
            UnsupportedInput: its inputs are not texts.
            UnknownInputType: its input type is neither `query` nor `document`.
        """
        texts = [text.decode() for text in texts_of(request, self.name)]
        check_input_type(request.input_type, self._options.model_id)
        return self._pool.submit(self._embed, texts, request, timeout_s)

    def _embed(self, texts: Sequence[str], request: Request, timeout_s: float) -> Answer:
        model = request.model or self._describe(timeout_s)
        vectors, tokens = self._request(texts, request.dimensions, timeout_s)
        vectors = truncate(vectors, request.dimensions)
        return Answer(vectors, tokens, model, is_proven=not self.is_versioned)

    def _describe(self, timeout_s: float) -> ServedModel:
        """Return the model. The length of its vectors is that of a probe's."""
        if self._model is None:
            vectors, _ = self._request(["dims"], None, timeout_s)
            self._model = self._described(vectors.shape[1])
        return self._model

    def _described(self, dims: int) -> ServedModel:
        options = self._options
        return ServedModel(
            name=options.model_id,
            space=fingerprint(options.provider, self._url or "", options.model_id),
            precision=REMOTE_PRECISION,
            dims=dims,
            max_tokens=self._max_tokens,
            max_batch_size=self._max_batch_size,
            provider=options.provider,
        )
