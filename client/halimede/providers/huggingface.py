"""Hugging Face's inference API, and Text Embeddings Inference, through the official SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from halimede.extras import import_optional
from halimede.inputs.content import InputKind
from halimede.providers import base
from halimede.providers.base import Answer, KeyOptions, Request
from halimede.results import ServedModel
from halimede_ops import errors

MAX_BATCH_SIZE = 32
"""What Text Embeddings Inference takes unless it is told otherwise."""
DEFAULT_MAX_TOKENS = 512
KEY = "HF_TOKEN"


class Options(KeyOptions):
    """A model of Hugging Face's inference API, or of a server of one's own."""

    provider: str = "huggingface"
    url: str | None = None
    """Address of an endpoint or a Text Embeddings Inference server."""


def connect(options: Options) -> HuggingFace:
    """The provider for these options."""
    return HuggingFace(options, import_optional("huggingface_hub", "huggingface"))


class HuggingFace:
    """One model behind `feature_extraction`."""

    def __init__(self, options: Options, sdk: Any) -> None:
        import_optional("aiohttp", "huggingface")
        self.name = f"huggingface:{options.model_id}"
        self._options = options
        key = options.secret(KEY)
        if key is None and options.url is None:
            raise errors.AccessDenied(
                f"huggingface wants a token: set {KEY}, or name another variable."
            )
        # Without a key of ours the SDK would send the one stored on this machine.
        self._client = sdk.AsyncInferenceClient(
            options.url or options.model_id, provider="hf-inference", token=key or "none"
        )
        self._model: ServedModel | None = None

    async def close(self) -> None:
        """Close the connections; a second call does nothing."""
        await self._client.close()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """The model; its dims are those of a probe text's vector."""
        base.check_texts(kind, self.name)
        if self._model is None:
            vectors = await self._ask([b"dims"], timeout_s)
            self._model = ServedModel(
                name=self._options.model_id,
                space=base.fingerprint(
                    "huggingface", self._options.url or "", self._options.model_id
                ),
                precision=base.REMOTE,
                dims=vectors.shape[1],
                max_tokens=self._options.max_tokens or DEFAULT_MAX_TOKENS,
                max_batch_size=MAX_BATCH_SIZE,
                provider="huggingface",
            )
        return self._model

    async def health(self, timeout_s: float) -> None:
        """Nothing when a probe text is embedded."""
        await self._ask([b"health"], timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer; token counts are not known."""
        texts = base.texts(request, self.name)
        model = await self.describe(timeout_s)
        base.prompt(request.input_type, {}, model.name)  # refuses an unknown one
        vectors = await self._ask(texts, timeout_s)
        return Answer(base.cut(vectors, request.dimensions), base.unknown_tokens(len(texts)), model)

    async def _ask(self, texts: Sequence[bytes], timeout_s: float) -> np.ndarray:
        # The SDK's type says str; the API takes a list as well, and answers a matrix.
        asked: Any = [text.decode() for text in texts]
        try:
            found = await asyncio.wait_for(
                self._client.feature_extraction(asked, truncate=True), timeout_s
            )
        except asyncio.TimeoutError:
            raise base.too_late(self.name, timeout_s) from None
        except Exception as error:  # aiohttp's, requests' or the SDK's own, by its version
            raise self._translated(error, timeout_s) from None
        if found.ndim == 3:
            raise errors.InvalidModel(
                f"{self.name} gives a vector a token; take a model of sentence-transformers."
            )
        return base.matrix(found, len(texts))

    def _translated(self, error: Exception, timeout_s: float) -> errors.HalimedeError:
        """Our error for one of the SDK's, whose own words may hold a text or a token."""
        status = getattr(error, "status", None) or getattr(
            getattr(error, "response", None), "status_code", None
        )
        if type(error).__name__ == "InferenceTimeoutError":
            return base.too_late(self.name, timeout_s)
        if status is not None:
            return base.of_status(self.name, int(status))
        if isinstance(error, OSError) or type(error).__module__.startswith("aiohttp"):
            return base.unreachable(self.name)
        return errors.ServerError(
            f"{self.name} gave an answer that is none ({type(error).__name__})."
        )
