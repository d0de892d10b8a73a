"""The client: texts to labelled embeddings, blocking or awaited; both drive the same flow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from typing_extensions import Unpack

from halimede import loop, requests
from halimede.chain import Chain
from halimede.config import Config, resolve
from halimede.flow import Call, Flow
from halimede.link import Link
from halimede.progress import bar
from halimede.providers import Options, Provider
from halimede.results import Embeddings, ServedModel
from halimede.statistics import Statistics
from halimede.stream import Stream
from halimede_ops.errors import InvalidInput
from halimede_ops.quantise import OutputType

STREAM_WINDOW = 1024
"""Texts in one part of a stream."""


class Asked(TypedDict, total=False):
    """What a caller may ask of every embedding; `Embedder.embed` says what each means."""

    input_type: str | None
    dimensions: int | None
    output_type: OutputType
    ranges: np.ndarray | None


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

    def _call(self, texts: Sequence[bytes], deadline_s: float | None, **asked: Any) -> Call:
        output_type = asked.get("output_type", "float32")
        if output_type in ("int8", "uint8") and asked.get("ranges") is None:
            raise InvalidInput(
                f"{output_type} needs ranges, or vectors of two calls could not be compared. "
                "Measure them once over a hundred texts or more: "
                "halimede_ops.quantise.measure_ranges(result.vectors)."
            )
        limit_s = self.config.deadline_s if deadline_s is None else deadline_s
        return Call(texts, deadline_s=limit_s, **asked)


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
        output_type: OutputType = "float32",
        ranges: np.ndarray | None = None,
        deadline_s: float | None = None,
        progress: bool = False,
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
            output_type: float32, float16, int8, uint8, binary or ubinary.
            ranges: `[2, dims]` of `halimede_ops.quantise.measure_ranges`, for int8 and uint8.
            deadline_s: longest time that this call may take.
            progress: show a bar, on a terminal.

        Raises:
            InvalidText: an item is not a string or cannot be encoded as UTF-8.
            UnknownInputType: the model has no such prompt.
            InvalidDimensions: `dimensions` is outside 1 … the model's dims.
            InvalidInput: unknown output type, or ranges are missing.
            ModelNotFound: the server does not have the model.
            ServerError: the server is not there, is overloaded, or did not answer in time.
            SpaceRefused: only providers of another space are left.
        """
        encoded = requests.encode([texts] if isinstance(texts, str) else texts)
        with bar(progress, len(encoded)) as advance:
            call = self._call(
                encoded,
                deadline_s,
                input_type=input_type,
                dimensions=dimensions,
                output_type=output_type,
                ranges=ranges,
                on_progress=advance if progress else None,
            )
            return self._loop.wait(self._flow.embed(call))

    def embed_iter(
        self,
        texts: Iterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **asked: Unpack[Asked],
    ) -> Iterator[Embeddings]:
        """Embeddings of a stream of any length, part by part, in its order.

        Each part is the result of up to `window` texts. No more texts are taken from the stream
        than two parts ahead of the part that is awaited, so memory stays bounded. All parts are of
        one space; another precision of it may stand in, and its parts say so.

        Args:
            texts: the texts; taken in the caller's thread.
            window: texts in one part.
            progress: show a bar, on a terminal.
            deadline_s: longest time that one part may take.
            asked: `input_type`, `dimensions`, `output_type` and `ranges` as of `embed`.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as `embed`.
        """
        stream = Stream(window)
        with bar(progress) as advance, contextlib.closing(stream):
            for part in stream.cut(texts):
                call = self._call(part, deadline_s, **asked)
                stream.send(self._loop.submit(self._flow.embed(call)))
                if stream.is_full:
                    yield stream.checked(stream.next().result(), advance)
            while stream.is_under_way:
                yield stream.checked(stream.next().result(), advance)

    def clear_cache(self) -> None:
        """Forget every cached vector in every tier.

        Raises:
            HalimedeError: a tier failed; the others are cleared.
        """
        self._loop.wait(self._flow.clear_cache())

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
        deadline_s: float | None = None,
        progress: bool = False,
        **asked: Unpack[Asked],
    ) -> Embeddings:
        """As `Embedder.embed`."""
        encoded = requests.encode([texts] if isinstance(texts, str) else texts)
        with bar(progress, len(encoded)) as advance:
            call = self._call(
                encoded, deadline_s, on_progress=advance if progress else None, **asked
            )
            return await asyncio.wrap_future(self._loop.submit(self._flow.embed(call)))

    async def embed_iter(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **asked: Unpack[Asked],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_iter`, of a stream of either kind."""
        stream = Stream(window)
        with bar(progress) as advance, contextlib.closing(stream):
            async for part in stream.cut_async(texts):
                call = self._call(part, deadline_s, **asked)
                stream.send(self._loop.submit(self._flow.embed(call)))
                if stream.is_full:
                    yield stream.checked(await asyncio.wrap_future(stream.next()), advance)
            while stream.is_under_way:
                yield stream.checked(await asyncio.wrap_future(stream.next()), advance)

    async def clear_cache(self) -> None:
        """As `Embedder.clear_cache`."""
        await asyncio.wrap_future(self._loop.submit(self._flow.clear_cache()))

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
    chain = Chain(links, config.rules())
    if config.cache is None:
        return Flow(chain, statistics)
    return Flow(chain, statistics, config.cache.open(), config.cache.model_check_s)


def _own_options(provider: Provider) -> Options:
    return Options.model_validate({"provider": "own", "model_id": provider.name})
