"""Ollama's embeddings (`/api/embed`), through the official SDK."""

from __future__ import annotations

import asyncio
from typing import Any

from halimede.extras import import_optional
from halimede.inputs.content import InputKind
from halimede.pipeline.latest import Latest
from halimede.providers import base
from halimede.providers.base import Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.results import ServedModel
from halimede_ops import errors

MAX_BATCH_SIZE = 256
DEFAULT_URL = "http://127.0.0.1:11434"
DEFAULT_MAX_TOKENS = 512
"""Where the model does not tell its context length."""


class Options(BaseOptions):
    """A model of an Ollama server."""

    provider: str = "ollama"
    url: str = DEFAULT_URL


def connect(options: Options) -> Ollama:
    """The provider for these options."""
    return Ollama(options, import_optional("ollama", "ollama"))


class Ollama:
    """One model of one Ollama server. Its digest is part of its space."""

    def __init__(self, options: Options, sdk: Any) -> None:
        self.name = f"ollama:{options.model_id}"
        self._options = options
        self._sdk = sdk
        self._client: Any = None
        self._timeout_s = options.timeout_s
        self._model: ServedModel | None = None
        self._reading = Latest(self._read)

    async def close(self) -> None:
        """Close the connections; a second call does nothing."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """The model as the server tells it now.

        Raises:
            ModelNotFound: the server does not have it.
        """
        base.check_texts(kind, self.name)
        self._timeout_s = timeout_s
        return await self._reading.read()

    async def health(self, timeout_s: float) -> None:
        """Nothing when a probe text is embedded."""
        await self._ask(
            "embed", timeout_s, model=self._options.model_id, input=["health"], truncate=True
        )

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer, if the model was the same before and after; no token counts.

        Raises:
            ModelChanged: it was not.
        """
        texts = base.texts(request, self.name)
        base.prompt(request.input_type, {}, self._options.model_id)  # refuses an unknown one
        before = self._model or await self.describe(timeout_s)
        answer = await self._ask(
            "embed",
            timeout_s,
            model=self._options.model_id,
            input=[text.decode() for text in texts],
            truncate=True,
        )
        if await self.describe(timeout_s) != before:
            raise errors.ModelChanged(f"{self.name} was changed while it was asked. Send again.")
        vectors = base.matrix(answer.embeddings, len(texts))
        return Answer(
            base.cut(vectors, request.dimensions), base.unknown_tokens(len(texts)), before
        )

    async def _read(self) -> ServedModel:
        listed = (await self._ask("list", self._timeout_s)).models
        name = self._options.model_id
        digest = next((row.digest for row in listed if row.model in (name, f"{name}:latest")), None)
        if digest is None:
            raise errors.ModelNotFound(f"{self.name} is not there. Run: ollama pull {name}")
        if self._model is None or self._model.version != digest:
            self._model = await self._served(digest)
        return self._model

    async def _served(self, digest: str) -> ServedModel:
        shown = await self._ask("show", self._timeout_s, model=self._options.model_id)
        facts = {key.rpartition(".")[2]: value for key, value in (shown.modelinfo or {}).items()}
        if "embedding_length" not in facts:
            raise errors.InvalidModel(f"{self.name} does not tell the length of its vectors.")
        told = facts.get("context_length", DEFAULT_MAX_TOKENS)
        quantised = shown.details.quantization_level if shown.details else None
        return ServedModel(
            name=self._options.model_id,
            space=base.fingerprint("ollama", self._options.model_id, digest),
            precision=(quantised or base.REMOTE).lower(),
            dims=int(facts["embedding_length"]),
            max_tokens=self._options.max_tokens or int(told),
            max_batch_size=MAX_BATCH_SIZE,
            provider="ollama",
            version=digest,
        )

    async def _ask(self, method: str, timeout_s: float, **arguments: Any) -> Any:
        """What the SDK returns; its errors become ours, without its words."""
        if self._client is None:
            self._client = self._sdk.AsyncClient(self._options.url, timeout=None)
        try:
            return await asyncio.wait_for(getattr(self._client, method)(**arguments), timeout_s)
        except self._sdk.ResponseError as error:
            raise base.of_status(self.name, error.status_code) from None
        except (asyncio.TimeoutError, TimeoutError):
            raise base.too_late(self.name, timeout_s) from None
        except (ValueError, TypeError):  # pydantic's, whose words hold the answer
            raise errors.ServerError(
                f"{self.name} gave an answer that is none of Ollama's."
            ) from None
        except Exception as error:  # of the HTTP library that the SDK happens to use
            if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
                raise base.unreachable(self.name) from None
            raise
