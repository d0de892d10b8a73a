"""What providers of a text model behind an HTTP API have in common."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np

from halimede.inputs.content import InputKind
from halimede.providers.answers import REMOTE_PRECISION, fingerprint, truncate
from halimede.providers.api_keys import ApiOptions
from halimede.providers.base import Answer, Request
from halimede.providers.input_kinds import check_texts, texts_of
from halimede.providers.prompts import check_input_type
from halimede.results import ServedModel


class TextApi(abc.ABC):
    """A text model behind an API that reports neither a version nor the length of its vectors."""

    def __init__(self, options: ApiOptions, max_tokens: int, max_batch_size: int) -> None:
        """Prepare a provider; `max_tokens` is the limit unless the options give another."""
        self.name = f"{options.provider}:{options.model_id}"
        self._options = options
        self._max_tokens = options.max_tokens or max_tokens
        self._max_batch_size = max_batch_size
        self._model: ServedModel | None = None

    @abc.abstractmethod
    async def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return vectors `[texts, dims]` float32, not necessarily cut, and tokens `[texts]` int32.

        Raises:
            HalimedeError: every failure. An SDK's own error is never raised.
        """

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """Return the model. The length of its vectors is that of a probe's.

        Raises:
            UnsupportedInput: `kind` is not text.
        """
        check_texts(kind, self.name)
        if self._model is None:
            vectors, _ = await self._request(["dims"], None, timeout_s)
            self._model = self._described(vectors.shape[1])
        return self._model

    async def health(self, timeout_s: float) -> None:
        """Raise unless a probe text can be embedded."""
        await self._request(["health"], None, timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """Return the answer to a request.

        Raises:
            UnsupportedInput: its inputs are not texts.
            UnknownInputType: its input type is neither `query` nor `document`.
        """
        texts = [text.decode() for text in texts_of(request, self.name)]
        model = await self.describe(timeout_s)
        check_input_type(request.input_type, model.name)
        vectors, tokens = await self._request(texts, request.dimensions, timeout_s)
        return Answer(truncate(vectors, request.dimensions), tokens, model)

    def _described(self, dims: int) -> ServedModel:
        options = self._options
        return ServedModel(
            name=options.model_id,
            space=fingerprint(options.provider, options.url or "", options.model_id),
            precision=REMOTE_PRECISION,
            dims=dims,
            max_tokens=self._max_tokens,
            max_batch_size=self._max_batch_size,
            provider=options.provider,
        )
