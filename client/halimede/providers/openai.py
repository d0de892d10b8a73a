"""OpenAI's embeddings, and servers with the same protocol, through the official SDK."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.providers.answers import to_matrix, unknown_tokens
from halimede.providers.api_keys import ApiOptions
from halimede.providers.http_errors import from_status, invalid_answer, timed_out, unreachable
from halimede.providers.text_api import TextApi
from halimede_ops import errors

DIMS = {
    "text-embedding-ada-002": 1536,
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
}
"""Length of the vectors of OpenAI's models. Other models are asked for it."""
TRUNCATABLE = "text-embedding-3"
"""Models with this prefix accept `dimensions`. Vectors of other models are truncated here."""
MAX_TOKENS = 8191
MAX_BATCH_SIZE = 2048
KEY_ENV = "OPENAI_API_KEY"


class Options(ApiOptions):
    """An OpenAI model, or a model of a server with the same protocol.

    `url` is such a server's, for example http://127.0.0.1:8080/v1.
    """

    provider: str = "openai"


def connect(options: Options) -> OpenAI:
    """Return the provider for these options."""
    return OpenAI(options, import_optional("openai", "openai"))


class OpenAI(TextApi):
    """A model behind OpenAI's protocol. Tokens are known only for a text sent alone."""

    def __init__(self, options: Options, sdk: Any) -> None:
        super().__init__(options, MAX_TOKENS, MAX_BATCH_SIZE)
        self._sdk = sdk
        key = options.key(KEY_ENV)
        # The SDK's debug lines hold the texts.
        logging.getLogger("openai").setLevel(logging.INFO)
        self._client = sdk.AsyncOpenAI(
            api_key=key, base_url=options.url, max_retries=0, timeout=options.timeout_s
        )
        if options.model_id in DIMS:
            self._model = self._described(DIMS[options.model_id])

    async def close(self) -> None:
        """Close the connections. A second call does nothing."""
        await self._client.close()

    async def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        model = self._options.model_id
        is_truncated = dimensions is not None and model.startswith(TRUNCATABLE)
        try:
            answer = await self._client.embeddings.create(
                model=model,
                input=texts,
                timeout=timeout_s,
                **({"dimensions": dimensions} if is_truncated else {}),
            )
            rows = sorted(answer.data, key=lambda row: row.index)
        except (self._sdk.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise self._translated(error, timeout_s) from None
        tokens = unknown_tokens(len(texts))
        if len(texts) == 1 and answer.usage is not None:
            tokens[0] = answer.usage.prompt_tokens
        return to_matrix([row.embedding for row in rows], len(texts)), tokens

    def _translated(self, error: Exception, timeout_s: float) -> errors.HalimedeError:
        if isinstance(error, self._sdk.APITimeoutError):
            return timed_out(self.name, timeout_s)
        if isinstance(error, self._sdk.APIConnectionError):
            return unreachable(self.name)
        if isinstance(error, self._sdk.APIStatusError):
            return from_status(self.name, error.status_code)
        return invalid_answer(self.name, error)
