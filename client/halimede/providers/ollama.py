"""Ollama's embeddings (`/api/embed`), through the official SDK."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.providers.answers import REMOTE_PRECISION, fingerprint, to_matrix, unknown_tokens
from halimede.providers.base import Options as BaseOptions
from halimede.providers.http_errors import (
    from_status,
    invalid_answer,
    is_connection_error,
    timed_out,
    unreachable,
)
from halimede.providers.proxies import is_local
from halimede.providers.text_api import TextApi
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


def connect(options: Options) -> list[Ollama]:
    """Return the provider for these options."""
    return [Ollama(options, import_optional("ollama", "ollama"))]


class Ollama(TextApi):
    """A model of an Ollama server. Its digest is part of its space. Tokens are unknown."""

    is_versioned = True

    def __init__(self, options: Options, sdk: Any) -> None:
        super().__init__(options, DEFAULT_MAX_TOKENS, MAX_BATCH_SIZE, options.url)
        self._sdk = sdk
        self._limits = threading.local()
        self._client = sdk.Client(
            options.url,
            timeout=options.timeout_s,
            trust_env=not is_local(options.url),
            # The SDK's own error has no headers.
            event_hooks={"request": [self._limit], "response": [self._check_status]},
        )

    def _request(
        self, texts: Sequence[str], dimensions: int | None, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        model = self._options.model_id
        answer = self._call(
            lambda client: client.embed(model=model, input=texts, truncate=True), timeout_s
        )
        return to_matrix(answer.embeddings, len(texts)), unknown_tokens(len(texts))

    def _describe(self, timeout_s: float) -> ServedModel:
        """Return the model that the server has now.

        Raises:
            ModelNotFound: the server does not have it.
        """
        name = self._options.model_id
        listed = self._call(lambda client: client.list(), timeout_s).models
        digest = next((row.digest for row in listed if row.model in (name, f"{name}:latest")), None)
        if digest is None:
            raise errors.ModelNotFound(f"{self.name} does not exist. Run: ollama pull {name}")
        if self._model is None or self._model.version != digest:
            self._model = self._show_model(digest, timeout_s)
        return self._model

    def _show_model(self, digest: str, timeout_s: float) -> ServedModel:
        name = self._options.model_id
        answer = self._call(lambda client: client.show(model=name), timeout_s)
        facts = _text_facts(answer.modelinfo or {})
        if "embedding_length" not in facts:
            raise errors.InvalidModel(f"{self.name} does not report the length of its vectors.")
        quantisation = answer.details.quantization_level if answer.details else None
        return ServedModel(
            name=name,
            space=fingerprint("ollama", name, digest),
            precision=(quantisation or REMOTE_PRECISION).lower(),
            dims=int(facts["embedding_length"]),
            max_tokens=self._options.max_tokens
            or int(facts.get("context_length", self._max_tokens)),
            max_batch_size=MAX_BATCH_SIZE,
            provider="ollama",
            version=digest,
        )

    def _call(self, send: Callable[[Any], Any], timeout_s: float) -> Any:
        """Return what `send` returns, given the SDK's client.

        Raises:
            HalimedeError: the call failed.
        """
        try:
            self._limits.timeout_s = timeout_s
            return send(self._client)
        except errors.HalimedeError:
            raise
        except self._sdk.ResponseError as error:
            raise from_status(self.name, error.status_code) from None
        except (ValueError, TypeError, AttributeError) as error:  # its words hold the answer
            raise invalid_answer(self.name, error) from None
        except Exception as error:
            if "Timeout" in type(error).__name__:
                raise timed_out(self.name, timeout_s) from None
            if is_connection_error(error, "httpx"):
                raise unreachable(self.name, self._url) from None
            raise

    def _limit(self, request: Any) -> None:
        """Set a request's own time limit: the SDK has one for all."""
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(kinds, self._limits.timeout_s)

    def _check_status(self, response: Any) -> None:
        if response.status_code >= 400:
            raise from_status(self.name, response.status_code, response.headers)


def _text_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the text model: a model may have parts, such as one for images, with their own."""
    prefix = f"{info.get('general.architecture', '')}."
    own = {key.removeprefix(prefix): info[key] for key in info if key.startswith(prefix)}
    return own or {key.rpartition(".")[2]: value for key, value in info.items()}
