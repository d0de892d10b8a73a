"""The client: texts to labelled embeddings, blocking or awaited; both drive the same flow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halimede import loop, requests
from halimede.chain import Chain
from halimede.config import Config, resolve
from halimede.flow import Call, Flow
from halimede.link import Link
from halimede.providers import Options, Provider
from halimede.results import Embeddings, ServedModel
from halimede.statistics import Statistics


class _Opened:
    """What both embedders are made of."""

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        model: str | None = None,
        *,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        config: Config | Mapping[str, Any] | Path | str | None = None,
        providers: Sequence[Provider] = (),
    ) -> None:
        """Connect lazily: the first call that needs a provider opens it.

        Args:
            url: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP; several
                servers of one model share the load. Default: `HALIMEDE_URL`, else 127.0.0.1:8001.
            model: name of the served model, or of one of the configuration's. Default:
                `HALIMEDE_MODEL`, else the configuration's default model, else all-MiniLM-L6-v2.
            timeout_s: longest wait for one request. Default: `HALIMEDE_TIMEOUT_S`, else 30.
            deadline_s: longest time that one call may take. Default: `HALIMEDE_DEADLINE_S`, else
                none.
            config: configuration, or the path of its file. Default: `HALIMEDE_CONFIG`.
            providers: open providers of one's own, in the order to ask them, instead of the
                configuration's models.

        Raises:
            InvalidConfig: the configuration or an argument cannot be.
        """
        self.config = resolve(
            config, url=url, model=model, timeout_s=timeout_s, deadline_s=deadline_s
        )
        self._loop = loop.shared()
        self._flow = _flow(self.config, providers)

    def _call(self, texts: Sequence[str] | str, deadline_s: float | None, **asked: Any) -> Call:
        return Call(
            requests.encode([texts] if isinstance(texts, str) else texts),
            deadline_s=self.config.deadline_s if deadline_s is None else deadline_s,
            **asked,
        )


class Embedder(_Opened):
    """Embeds texts. Safe to use from several threads.

    >>> with Embedder("127.0.0.1:8001") as embedder:
    ...     result = embedder.embed(["hello world"])
    """

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; a second call does nothing."""
        self._loop.wait(self._flow.close())

    @property
    def model(self) -> ServedModel:
        """The first provider's model, as it is now."""
        return self._loop.wait(self._flow.describe())

    def embed(
        self,
        texts: Sequence[str] | str,
        *,
        input_type: str | None = None,
        dimensions: int | None = None,
        deadline_s: float | None = None,
    ) -> Embeddings:
        """Embeddings of the texts, in their order: vectors `[texts, dims]`.

        One string is one text. Any number of texts is taken: they are sent in requests of at
        most the model's `max_batch_size`. An empty text is embedded as sentence-transformers
        embeds it; a text beyond the model's token limit is cut off, and `truncated` says so.
        All vectors of one result are of one space and precision: when a provider fails midway,
        the next one embeds the whole call.

        Args:
            texts: the texts.
            input_type: `query`, `document` or the name of another prompt of the model.
            dimensions: keep this many leading components (Matryoshka), normalised again.
            deadline_s: longest time that this call may take.

        Raises:
            InvalidText: an item is not a string or cannot be encoded as UTF-8.
            UnknownInputType: the model has no such prompt.
            InvalidDimensions: `dimensions` is outside 1 … the model's dims.
            ModelNotFound: the server does not have the model.
            ServerError: the server is not there, is overloaded, or did not answer in time.
            SpaceRefused: only providers of another space are left.
        """
        call = self._call(texts, deadline_s, input_type=input_type, dimensions=dimensions)
        return self._loop.wait(self._flow.embed(call))

    def health(self) -> list[dict[str, Any]]:
        """One report a provider: whether it embeds a probe text, how fast, and what it is."""
        return self._loop.wait(self._flow.health())

    def stats(self) -> dict[str, Any]:
        """What this embedder did so far, as JSON types."""
        return self._loop.wait(self._flow.stats())


class AsyncEmbedder(_Opened):
    """`Embedder` for a program that awaits; cancelling a call cancels its requests.

    >>> async with AsyncEmbedder("127.0.0.1:8001") as embedder:
    ...     result = await embedder.embed(["hello world"])
    """

    async def __aenter__(self) -> AsyncEmbedder:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; a second call does nothing."""
        await asyncio.wrap_future(self._loop.submit(self._flow.close()))

    async def describe(self) -> ServedModel:
        """The first provider's model, as it is now."""
        return await asyncio.wrap_future(self._loop.submit(self._flow.describe()))

    async def embed(
        self,
        texts: Sequence[str] | str,
        *,
        input_type: str | None = None,
        dimensions: int | None = None,
        deadline_s: float | None = None,
    ) -> Embeddings:
        """As `Embedder.embed`."""
        call = self._call(texts, deadline_s, input_type=input_type, dimensions=dimensions)
        return await asyncio.wrap_future(self._loop.submit(self._flow.embed(call)))

    async def health(self) -> list[dict[str, Any]]:
        """As `Embedder.health`."""
        return await asyncio.wrap_future(self._loop.submit(self._flow.health()))

    async def stats(self) -> dict[str, Any]:
        """What this embedder did so far, as JSON types."""
        return await asyncio.wrap_future(self._loop.submit(self._flow.stats()))


def _flow(config: Config, providers: Sequence[Provider]) -> Flow:
    statistics = Statistics()
    if providers:
        links = [Link(_own_options(provider), statistics, provider) for provider in providers]
    else:
        links = [Link(options, statistics) for options in config.chain()]
    return Flow(Chain(links, config.rules()), statistics)


def _own_options(provider: Provider) -> Options:
    return Options.model_validate({"provider": "own", "model_id": provider.name})
