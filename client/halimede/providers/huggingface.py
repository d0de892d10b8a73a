"""Hugging Face's inference API, and Text Embeddings Inference, through the official SDK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.providers.answers import to_matrix, unknown_tokens
from halimede.providers.api_keys import ApiOptions
from halimede.providers.http_errors import (
    from_status,
    invalid_answer,
    is_connection_error,
    timed_out,
    unreachable,
)
from halimede.providers.proxies import is_local
from halimede.providers.text_api import TextApi
from halimede_ops import errors

MAX_TOKENS = 512
MAX_BATCH_SIZE = 32
"""Default limit of Text Embeddings Inference."""
KEY_ENV = "HF_TOKEN"
NO_PROXIES = {"http": None, "https": None, "all": None}
HOST = "https://huggingface.co"
"""Host of the inference API, for the choice of a proxy."""


class Options(ApiOptions):
    """A model of Hugging Face's inference API.

    `url` is an inference endpoint's or a Text Embeddings Inference server's.
    """

    provider: str = "huggingface"


def connect(options: Options) -> list[HuggingFace]:
    """Return the provider for these options."""
    return [HuggingFace(options, import_optional("huggingface_hub", "huggingface"))]


class HuggingFace(TextApi):
    """A model behind `feature_extraction`. Tokens are unknown."""

    def __init__(self, options: Options, sdk: Any) -> None:
        super().__init__(options, MAX_TOKENS, MAX_BATCH_SIZE, options.url)
        key = options.key(KEY_ENV)
        self._connect: Callable[[float], Any] = lambda timeout_s: sdk.InferenceClient(
            options.url or options.model_id,
            provider="hf-inference",
            token=key,
            timeout=timeout_s,
            proxies=NO_PROXIES if is_local(options.url or HOST) else None,
        )
        """Returns a client: its time limit is one for all requests. Connections are the SDK's."""
        self._client = None

    def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            vectors = self._connect(timeout_s).feature_extraction(texts, truncate=True)
        except Exception as error:  # requests', or the SDK's own, by its version
            raise self._translated(error, timeout_s) from None
        if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiu":
            raise invalid_answer(self.name, TypeError())
        if vectors.ndim == 3:
            raise errors.InvalidModel(
                f"{self.name} gives a vector a token. Use a sentence-transformers model."
            )
        return to_matrix(vectors, len(texts)), unknown_tokens(len(texts))

    def _translated(self, error: Exception, timeout_s: float) -> errors.HalimedeError:
        response = getattr(error, "response", None)
        if "Timeout" in type(error).__name__:
            return timed_out(self.name, timeout_s)
        if response is not None:
            return from_status(self.name, response.status_code, response.headers)
        if is_connection_error(error, "requests") and not isinstance(error, ValueError):
            return unreachable(self.name, self._url or HOST)
        return invalid_answer(self.name, error)
