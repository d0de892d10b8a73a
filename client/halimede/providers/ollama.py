"""Ollama's embeddings (`/api/embed`), through the official SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from halimede.extras import import_optional
from halimede.inputs.content import InputKind
from halimede.pipeline.latest import Latest
from halimede.providers.answers import (
    REMOTE_PRECISION,
    fingerprint,
    to_matrix,
    truncate,
    unknown_tokens,
)
from halimede.providers.base import Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.providers.http_errors import (
    from_status,
    invalid_answer,
    is_connection_error,
    timed_out,
    unreachable,
)
from halimede.providers.input_kinds import check_texts, texts_of
from halimede.providers.prompts import check_input_type
from halimede.results import ServedModel
from halimede_ops import errors

MAX_BATCH_SIZE = 256
DEFAULT_URL = "http://127.0.0.1:11434"
DEFAULT_MAX_TOKENS = 512
"""Token limit of models that do not report their context length."""


class Options(BaseOptions):
    """A model of an Ollama server."""

    provider: str = "ollama"
    url: str = DEFAULT_URL
    """Address of the Ollama server."""


def connect(options: Options) -> Ollama:
    """Return the provider for these options."""
    return Ollama(options, import_optional("ollama", "ollama"))


class Ollama:
    """A model of an Ollama server. Its digest is part of its space. Tokens are unknown."""

    def __init__(self, options: Options, sdk: Any) -> None:
        self.name = f"ollama:{options.model_id}"
        self._options = options
        self._sdk = sdk
        self._client: Any = None
        self._timeout_s = options.timeout_s
        self._model: ServedModel | None = None
        self._description = Latest(self._read_model)

    async def close(self) -> None:
        """Close the connections. A second call does nothing."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """Return the model that the server has now.

        Raises:
            ModelNotFound: the server does not have it.
            UnsupportedInput: `kind` is not text.
        """
        check_texts(kind, self.name)
        self._timeout_s = timeout_s
        return await self._description.read()

    async def health(self, timeout_s: float) -> None:
        """Raise unless a probe text can be embedded."""
        await self._embed(["health"], timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """Return the answer, if the model was the same before and after the request.

        Raises:
            ModelChanged: it was not.
            UnsupportedInput: the inputs are not texts.
            UnknownInputType: the input type is neither `query` nor `document`.
        """
        texts = [text.decode() for text in texts_of(request, self.name)]
        check_input_type(request.input_type, self._options.model_id)
        before = self._model or await self.describe(timeout_s)
        answer = await self._embed(texts, timeout_s)
        if await self.describe(timeout_s) != before:
            raise errors.ModelChanged(f"{self.name} changed during the request. Send again.")
        vectors = to_matrix(answer.embeddings, len(texts))
        return Answer(truncate(vectors, request.dimensions), unknown_tokens(len(texts)), before)

    async def _embed(self, texts: Sequence[str], timeout_s: float) -> Any:
        model = self._options.model_id
        return await self._call(
            lambda client: client.embed(model=model, input=texts, truncate=True), timeout_s
        )

    async def _read_model(self) -> ServedModel:
        name = self._options.model_id
        listed = (await self._call(lambda client: client.list(), self._timeout_s)).models
        digest = next((row.digest for row in listed if row.model in (name, f"{name}:latest")), None)
        if digest is None:
            raise errors.ModelNotFound(f"{self.name} does not exist. Run: ollama pull {name}")
        if self._model is None or self._model.version != digest:
            self._model = await self._show_model(digest)
        return self._model

    async def _show_model(self, digest: str) -> ServedModel:
        name = self._options.model_id
        answer = await self._call(lambda client: client.show(model=name), self._timeout_s)
        facts = {key.rpartition(".")[2]: value for key, value in (answer.modelinfo or {}).items()}
        if "embedding_length" not in facts:
            raise errors.InvalidModel(f"{self.name} does not report the length of its vectors.")
        quantisation = answer.details.quantization_level if answer.details else None
        return ServedModel(
            name=name,
            space=fingerprint("ollama", name, digest),
            precision=(quantisation or REMOTE_PRECISION).lower(),
            dims=int(facts["embedding_length"]),
            max_tokens=self._options.max_tokens
            or int(facts.get("context_length", DEFAULT_MAX_TOKENS)),
            max_batch_size=MAX_BATCH_SIZE,
            provider="ollama",
            version=digest,
        )

    async def _call(self, send: Callable[[Any], Awaitable[Any]], timeout_s: float) -> Any:
        """Return what `send` returns, given the SDK's client.

        Raises:
            HalimedeError: the call failed.
        """
        if self._client is None:
            self._client = self._sdk.AsyncClient(self._options.url, timeout=None)
        try:
            return await asyncio.wait_for(send(self._client), timeout_s)
        except self._sdk.ResponseError as error:
            raise from_status(self.name, error.status_code) from None
        except TimeoutError:
            raise timed_out(self.name, timeout_s) from None
        except (ValueError, TypeError) as error:  # pydantic's, whose words hold the answer
            raise invalid_answer(self.name, error) from None
        except Exception as error:
            if is_connection_error(error, "httpx"):
                raise unreachable(self.name) from None
            raise
