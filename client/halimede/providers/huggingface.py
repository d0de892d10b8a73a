"""Hugging Face's inference API, and Text Embeddings Inference, through the official SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
from halimede.providers.text_api import TextApi
from halimede_ops import errors

MAX_TOKENS = 512
MAX_BATCH_SIZE = 32
"""Default limit of Text Embeddings Inference."""
KEY_ENV = "HF_TOKEN"


class Options(ApiOptions):
    """A model of Hugging Face's inference API.

    `url` is an inference endpoint's or a Text Embeddings Inference server's.
    """

    provider: str = "huggingface"


def connect(options: Options) -> HuggingFace:
    """Return the provider for these options."""
    import_optional("aiohttp", "huggingface")
    return HuggingFace(options, import_optional("huggingface_hub", "huggingface"))


class HuggingFace(TextApi):
    """A model behind `feature_extraction`. Tokens are unknown."""

    def __init__(self, options: Options, sdk: Any) -> None:
        super().__init__(options, MAX_TOKENS, MAX_BATCH_SIZE)
        self._client = sdk.AsyncInferenceClient(
            options.url or options.model_id, provider="hf-inference", token=options.key(KEY_ENV)
        )

    async def close(self) -> None:
        """Close the connections. A second call does nothing."""
        await self._client.close()

    async def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            vectors = await asyncio.wait_for(
                self._client.feature_extraction(texts, truncate=True), timeout_s
            )
        except TimeoutError:
            raise timed_out(self.name, timeout_s) from None
        except Exception as error:  # aiohttp's, requests' or the SDK's own, by its version
            raise self._translated(error, timeout_s) from None
        if vectors.ndim == 3:
            raise errors.InvalidModel(
                f"{self.name} gives a vector a token. Use a sentence-transformers model."
            )
        return to_matrix(vectors, len(texts)), unknown_tokens(len(texts))

    def _translated(self, error: Exception, timeout_s: float) -> errors.HalimedeError:
        response = getattr(error, "response", None)
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
        if type(error).__name__ == "InferenceTimeoutError":
            return timed_out(self.name, timeout_s)
        if status is not None:
            return from_status(self.name, int(status))
        if is_connection_error(error, "aiohttp"):
            return unreachable(self.name)
        return invalid_answer(self.name, error)
