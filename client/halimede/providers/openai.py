"""OpenAI's embeddings, and every server that speaks the same protocol, through the official SDK."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.inputs.content import InputKind
from halimede.providers import base
from halimede.providers.base import Answer, KeyOptions, Request
from halimede.results import ServedModel
from halimede_ops import errors

MODELS = {
    "text-embedding-ada-002": 1536,
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
}
"""Dims of OpenAI's models; of any other model they are asked for."""
CUTTABLE = "text-embedding-3"
"""Models of this prefix take `dimensions`; the vectors of others are cut here."""
MAX_TOKENS = 8191
MAX_BATCH_SIZE = 2048
KEY = "OPENAI_API_KEY"


class Options(KeyOptions):
    """An OpenAI model, or one of a server that speaks its protocol."""

    provider: str = "openai"
    url: str | None = None
    """Base url of another server, such as http://127.0.0.1:8080/v1."""


def connect(options: Options) -> OpenAI:
    """The provider for these options."""
    return OpenAI(options, import_optional("openai", "openai"))


class OpenAI:
    """One model behind OpenAI's protocol."""

    def __init__(self, options: Options, sdk: Any) -> None:
        self.name = f"openai:{options.model_id}"
        self._options = options
        self._sdk = sdk
        key = options.secret(KEY)
        if key is None and options.url is None:
            raise errors.AccessDenied(f"openai wants a key: set {KEY}, or name another variable.")
        # The SDK's debug lines hold the texts.
        logging.getLogger("openai").setLevel(logging.INFO)
        self._client = sdk.AsyncOpenAI(
            api_key=key or "none", base_url=options.url, max_retries=0, timeout=options.timeout_s
        )
        self._model: ServedModel | None = None
        if options.model_id in MODELS:
            self._model = self._served(MODELS[options.model_id])

    async def close(self) -> None:
        """Close the connections; a second call does nothing."""
        await self._client.close()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """The model; dims of one that is not OpenAI's are those of a probe text's vector."""
        base.check_texts(kind, self.name)
        if self._model is None:
            vectors, _ = await self._ask([b"dims"], None, timeout_s)
            self._model = self._served(vectors.shape[1])
        return self._model

    async def health(self, timeout_s: float) -> None:
        """Nothing when a probe text is embedded."""
        await self._ask([b"health"], None, timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer; token counts are known of single texts alone."""
        texts = base.texts(request, self.name)
        model = await self.describe(timeout_s)
        base.prompt(request.input_type, {}, model.name)  # refuses an unknown one
        asked = request.dimensions if model.name.startswith(CUTTABLE) else None
        vectors, tokens = await self._ask(texts, asked, timeout_s)
        return Answer(base.cut(vectors, request.dimensions), tokens, model)

    async def _ask(
        self, texts: Sequence[bytes], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        options = {} if dimensions is None else {"dimensions": dimensions}
        try:
            answer = await self._client.embeddings.create(
                model=self._options.model_id,
                input=[text.decode() for text in texts],
                timeout=timeout_s,
                **options,
            )
            rows = sorted(answer.data, key=lambda row: row.index)
        except (self._sdk.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise self._translated(error, timeout_s) from None
        tokens = base.unknown_tokens(len(texts))
        if len(texts) == 1 and answer.usage is not None:
            tokens[0] = answer.usage.prompt_tokens
        return base.matrix([row.embedding for row in rows], len(texts)), tokens

    def _served(self, dims: int) -> ServedModel:
        return ServedModel(
            name=self._options.model_id,
            space=base.fingerprint("openai", self._options.url or "", self._options.model_id),
            precision=base.REMOTE,
            dims=dims,
            max_tokens=self._options.max_tokens or MAX_TOKENS,
            max_batch_size=MAX_BATCH_SIZE,
            provider="openai",
        )

    def _translated(self, error: Exception, timeout_s: float) -> errors.HalimedeError:
        """Our error for one of the SDK's, whose own words may hold a text or a key."""
        if isinstance(error, self._sdk.APITimeoutError):
            return base.too_late(self.name, timeout_s)
        if isinstance(error, self._sdk.APIConnectionError):
            return base.unreachable(self.name)
        if isinstance(error, self._sdk.APIStatusError):
            return base.of_status(self.name, error.status_code)
        return errors.ServerError(f"{self.name} gave an answer that is none of OpenAI's protocol.")
