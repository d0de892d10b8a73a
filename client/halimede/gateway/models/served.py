"""Served models: each name that the gateway answers to, with the client that asks the model."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import difflib
import functools
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from halimede.classifier import AsyncClassifier
from halimede.config.resolve import resolve
from halimede.config.schema import Config
from halimede.documents.parts import joined
from halimede.embedder import AsyncEmbedder
from halimede.gateway.models.gathering import Gatherer
from halimede.providers import onnx
from halimede.providers.base import Options
from halimede.providers.triton import provider as triton
from halimede.reranker import AsyncReranker
from halimede.results import (
    Classification,
    Embeddings,
    MultiEmbeddings,
    Scores,
    ServedModel,
    SparseEmbeddings,
)
from halimede_ops.errors import HalimedeError, ModelNotFound
from halimede_repository import configs

LIST_S = 10.0
"""Seconds that a list of a server's models is used before it is read again."""
NEW_S = 1.0
"""Seconds that it is used to say that there is no model of a name."""
MAX_GATHERERS = 256
"""Kinds of calls that are remembered for a model, such as its numbers of dimensions."""


class Client(AsyncReranker, AsyncClassifier, AsyncEmbedder):
    """A client with the calls of every kind of model, over one pipeline."""


class Model:
    """A model, and the calls that go to it. Callers who ask the same at one time share calls."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        """The name in the gateway."""
        self.options = config.models[config.default_model]
        """How it is reached."""
        self.client = Client(config=config)
        self._gatherers: dict[Hashable, Gatherer[Any]] = {}
        self._facts: ServedModel | None = None
        self._read_s = 0.0

    async def facts(self) -> ServedModel:
        """The model as its server describes it, at most LIST_S ago.

        Raises:
            HalimedeError: no provider of it answers.
        """
        now = time.monotonic()
        if self._facts is None or now - self._read_s > LIST_S:
            self._facts, self._read_s = await self.client.describe(), now
        return self._facts

    async def embed(
        self,
        texts: Sequence[str],
        input_type: str | None = None,
        dimensions: int | None = None,
        sticky_key: str | None = None,
    ) -> Embeddings:
        """Embed texts, as `Embedder.embed`."""
        options = given(input_type=input_type, dimensions=dimensions, sticky_key=sticky_key)
        return await self._gathered("embed", options).ask(texts)

    async def embed_parts(
        self,
        parts: Sequence[str],
        input_type: str | None = None,
        dimensions: int | None = None,
    ) -> Embeddings:
        """Embed the parts of one text by late chunking, as `Embedder.embed_documents`."""
        text, spans = joined(parts)
        options = given(input_type=input_type, dimensions=dimensions)
        return await self.client.embed_documents([text], spans=[spans], late=True, **options)

    async def embed_sparse(
        self, texts: Sequence[str], input_type: str | None = None
    ) -> SparseEmbeddings:
        """Embed texts, as `Embedder.embed_sparse`."""
        return await self._gathered("embed_sparse", given(input_type=input_type)).ask(texts)

    async def embed_multi(
        self, texts: Sequence[str], input_type: str | None = None
    ) -> MultiEmbeddings:
        """Embed texts, as `Embedder.embed_multi`."""
        return await self._gathered("embed_multi", given(input_type=input_type)).ask(texts)

    async def embed_images(
        self, images: Sequence[bytes], dimensions: int | None = None
    ) -> Embeddings:
        """Embed image files, as `Embedder.embed_images`."""
        return await self.client.embed_images(list(images), **given(dimensions=dimensions))

    async def score(self, pairs: Sequence[tuple[str, str]]) -> Scores:
        """Score pairs of a query and a document, as `Reranker.score`."""
        return await self._gathered("score", {}).ask(pairs)

    async def classify(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> Classification:
        """Classify texts, or texts and the second text of each, as `Classifier.classify`."""
        if pairs is not None:
            return await self.client.classify(list(texts), list(pairs))
        return await self._gathered("classify", {}).ask(texts)

    @functools.cached_property
    def in_background(self) -> Model:
        """The same model, whose calls are not gathered with those of callers who wait."""
        other = copy.copy(self)
        other._gatherers = {}
        return other

    async def close(self) -> None:
        """Close the client."""
        await self.client.close()

    def _gathered(self, method: str, options: dict[str, Any]) -> Gatherer[Any]:
        key = (method, *sorted(options.items()))
        gatherer = self._gatherers.get(key)
        if gatherer is None:
            call = getattr(self.client, method)

            async def run(inputs: list[Any]) -> Any:
                return await call(inputs, **options)

            if len(self._gatherers) >= MAX_GATHERERS:
                busy = {key: one for key, one in self._gatherers.items() if not one.is_idle}
                self._gatherers = busy
            gatherer = self._gatherers[key] = Gatherer(run)
        return gatherer


class Served:
    """The models that the gateway answers for: those of the configuration, under its names, and
    the others of the same servers and repositories.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._models: dict[str, Model] = {}
        self._found: dict[str, Options] = {}
        self._read_s = -LIST_S
        self._reading = asyncio.Lock()

    async def model(self, name: str | None, use_fallback: bool = True) -> Model:
        """Return a model by its name or alias; None names the default model.

        Raises:
            ModelNotFound: there is none of this name.
        """
        name = self._config.gateway.aliases.get(name, name) if name else self._config.default_model
        key = name if use_fallback else f"{name} alone"
        model = self._models.get(key)
        if model is None:
            config = await self._config_of(name)
            if not use_fallback:
                config = config.model_copy(update={"fallback": ()})
            model = self._models.setdefault(key, Model(name, config))
        return model

    async def all(self) -> list[Model]:
        """Return every model whose server describes it now, in the order of the names."""
        await self._read(LIST_S)
        models = [await self.model(name) for name in self.names()]
        answers = await asyncio.gather(*(m.facts() for m in models), return_exceptions=True)
        return [
            model
            for model, answer in zip(models, answers, strict=True)
            if not isinstance(answer, BaseException)
        ]

    def names(self) -> list[str]:
        """Names as last read, the configuration's first."""
        return [*self._config.models, *(n for n in self._found if n not in self._config.models)]

    async def close(self) -> None:
        """Close every client."""
        for model in tuple(self._models.values()):
            await model.close()

    async def _config_of(self, name: str) -> Config:
        """Return the configuration whose default model is this one.

        Raises:
            ModelNotFound: there is none of this name.
        """
        if name in self._config.models:
            is_default = name == self._config.default_model
            return self._config if is_default else resolve(self._config, model=name)
        if name not in self._found:
            await self._read(NEW_S)
        if name not in self._found:
            near = difflib.get_close_matches(name, self.names(), 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ModelNotFound(f"there is no model of this name.{hint} /v1/models lists them.")
        update = {
            "models": {name: self._found[name]},
            "default_model": name,
            "fallback": (),
            "space": None,
        }
        return self._config.model_copy(update=update)

    async def _read(self, max_age_s: float) -> None:
        """List the servers' models, unless that was done at most `max_age_s` ago."""
        if not self._config.gateway.serve_all or self._config.development:
            return
        async with self._reading:
            if time.monotonic() - self._read_s < max_age_s:
                return
            self._found = await asyncio.to_thread(found, tuple(self._config.models.values()))
            self._read_s = time.monotonic()


def found(models: Sequence[Options]) -> dict[str, Options]:
    """Return the models of the servers and repositories that these models come from, by name.

    A server that does not answer adds none.
    """
    by_name: dict[str, Options] = {}
    for options in models:
        with contextlib.suppress(HalimedeError):
            for name in _names(options):
                alone = options.model_copy(update={"model_id": name, "dimensions": None})
                by_name.setdefault(name, alone)
    return by_name


def _names(options: Options) -> list[str]:
    if isinstance(options, triton.Options):
        models = triton.served_models(options)
        return [model.name for model in models if not model.name.endswith(configs.CANDIDATE)]
    if isinstance(options, onnx.Options):
        return [name for name in configs.models_to_load(Path(options.path)) if _is_model(name)]
    return []


def _is_model(name: str) -> bool:
    return not name.endswith((configs.CANDIDATE, configs.MAXSIM, *configs.ALIASES))


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
