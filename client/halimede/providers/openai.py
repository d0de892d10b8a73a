"""OpenAI's embeddings, and servers with the same protocol, through the official SDK."""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.providers.answers import to_matrix, unknown_tokens
from halimede.providers.api_keys import ApiOptions
from halimede.providers.http_errors import from_status, invalid_answer, timed_out, unreachable
from halimede.providers.proxies import is_local
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
URL_ENV = "OPENAI_BASE_URL"
"""The variable that the SDK reads without a `url`."""
HOST = "https://api.openai.com/v1"
MAX_COUNT = 2**31
"""A number of tokens above this is none."""


class Options(ApiOptions):
    """An OpenAI model, or a model of a server with the same protocol.

    `url` is such a server's, for example http://127.0.0.1:8080/v1.
    """

    provider: str = "openai"


def connect(options: Options) -> list[OpenAI]:
    """Return the provider for these options."""
    return [OpenAI(options, import_optional("openai", "openai"))]


_in_request = contextvars.ContextVar("_in_request", default=False)


def _is_not_ours(_: logging.LogRecord) -> bool:
    """Whether a record is of another call than ours: the SDK's debug records hold the texts."""
    return not _in_request.get()


class OpenAI(TextApi):
    """A model behind OpenAI's protocol. Tokens are known only for a text sent alone."""

    def __init__(self, options: Options, sdk: Any) -> None:
        url = options.url or os.environ.get(URL_ENV)
        super().__init__(options, MAX_TOKENS, MAX_BATCH_SIZE, url)
        self._sdk = sdk
        self._base64_works: bool | None = None
        logging.getLogger("openai._base_client").addFilter(_is_not_ours)
        self._client = sdk.OpenAI(
            api_key=options.key(KEY_ENV),
            base_url=url,
            max_retries=0,
            timeout=options.timeout_s,
            http_client=sdk.DefaultHttpxClient(trust_env=not is_local(url or HOST)),
        )
        if options.model_id in DIMS:
            self._model = self._described(DIMS[options.model_id])

    def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        model = self._options.model_id
        given: dict[str, Any] = {"model": model, "input": texts, "timeout": timeout_s}
        if dimensions is not None and model.startswith(TRUNCATABLE):
            given["dimensions"] = dimensions
        if self._base64_works is False:
            given["encoding_format"] = "float"
        token = _in_request.set(True)
        try:
            answer = self._asked(given)
            rows = sorted(answer.data, key=lambda row: row.index)
            if [row.index for row in rows] != list(range(len(texts))):
                raise ValueError
            embeddings = [row.embedding for row in rows]
        except (self._sdk.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise self._translated(error, timeout_s) from None
        finally:
            _in_request.reset(token)
        tokens = unknown_tokens(len(texts))
        counted = getattr(answer.usage, "prompt_tokens", None)
        if len(texts) == 1 and isinstance(counted, int) and 0 <= counted < MAX_COUNT:
            tokens[0] = counted
        return to_matrix(embeddings, len(texts)), tokens

    def _asked(self, given: dict[str, Any]) -> Any:
        """Return the answer. The SDK asks for base64, which not every server knows."""
        create = self._client.embeddings.create
        if self._base64_works is not None:
            return create(**given)
        try:
            answer = create(**given)
        except (self._sdk.BadRequestError, self._sdk.UnprocessableEntityError):
            answer = create(**given, encoding_format="float")
            self._base64_works = False
        else:
            self._base64_works = True
        return answer

    def _translated(self, error: Exception, timeout_s: float) -> errors.HalimedeError:
        if isinstance(error, self._sdk.APITimeoutError):
            return timed_out(self.name, timeout_s)
        if isinstance(error, self._sdk.APIConnectionError):
            return unreachable(self.name, str(self._client.base_url))
        if isinstance(error, self._sdk.APIStatusError):
            return from_status(self.name, error.status_code, error.response.headers)
        return invalid_answer(self.name, error)
