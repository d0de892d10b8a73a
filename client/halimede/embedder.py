"""The client: texts and images to labelled embeddings, blocking or awaited; both drive the same
flow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from typing_extensions import Unpack

from halimede.config.resolve import resolve
from halimede.config.schema import Config
from halimede.inputs.content import Input, InputKind
from halimede.inputs.images import ImageLike, image_input, image_inputs, pair_inputs
from halimede.inputs.texts import encode_text, encode_texts
from halimede.inputs.urls import Fetch
from halimede.observability.progress import bar
from halimede.observability.statistics import Statistics
from halimede.pipeline import loop
from halimede.pipeline.chain import Chain
from halimede.pipeline.flow import Call, Flow
from halimede.pipeline.link import Link
from halimede.pipeline.stream import Stream
from halimede.providers import Options, Provider
from halimede.results import Embeddings, ServedModel
from halimede_ops.errors import InvalidInput
from halimede_ops.quantise import OutputType

STREAM_WINDOW = 1024
"""Texts in one part of a stream."""
IMAGES_WINDOW = 64
"""Images in one part of a stream."""


class Asked(TypedDict, total=False):
    """What a caller may ask of every embedding; `Embedder.embed` says what each means."""

    dimensions: int | None
    output_type: OutputType
    ranges: np.ndarray | None
    sticky_key: str | None


class AskedOfTexts(Asked, total=False):
    """What a caller may ask of the embedding of texts."""

    input_type: str | None


class AskedOfImages(Asked, total=False):
    """What a caller may ask of the embedding of images; `Embedder.embed_images` tells of it."""

    errors: Literal["raise", "collect"]


class AskedOfPairs(AskedOfTexts, AskedOfImages, total=False):
    """What a caller may ask of the embedding of texts with images."""


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

    def _call(
        self, kind: InputKind, items: Sequence[Input], deadline_s: float | None, **asked: Any
    ) -> Call:
        output_type = asked.get("output_type", "float32")
        if output_type in ("int8", "uint8") and asked.get("ranges") is None:
            raise InvalidInput(
                f"{output_type} needs ranges, or vectors of two calls could not be compared. "
                "Measure them once over a hundred texts or more: "
                "halimede_ops.quantise.measure_ranges(result.vectors)."
            )
        limit_s = self.config.deadline_s if deadline_s is None else deadline_s
        asked["sticky_key"] = _in_bytes(asked.get("sticky_key"))
        return Call(items, kind, deadline_s=limit_s, **asked)


def _in_bytes(sticky_key: str | None) -> bytes | None:
    if sticky_key is None:
        return None
    if not isinstance(sticky_key, str):
        raise InvalidInput(f"sticky_key is {type(sticky_key).__name__}; give a str.")
    return sticky_key.encode("utf-8", "surrogatepass")


class Embedder(_Opened):
    """Embeds texts and images. Safe to use from several threads.

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
        sticky_key: str | None = None,
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
            sticky_key: what decides whether a canary of the model answers, such as a user's id:
                all calls of one key are answered by one version. Default: each text decides for
                itself.
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
        encoded = encode_texts([texts] if isinstance(texts, str) else texts)
        return self._embed(
            "text",
            encoded,
            deadline_s,
            progress,
            input_type=input_type,
            dimensions=dimensions,
            output_type=output_type,
            ranges=ranges,
            sticky_key=sticky_key,
        )

    def embed_images(
        self,
        images: Sequence[ImageLike] | ImageLike,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **asked: Unpack[AskedOfImages],
    ) -> Embeddings:
        """Embeddings of the images, in their order: vectors `[images, dims]`.

        An image is a path, a url, the bytes of a file, a PIL image (encoded as PNG, which loses
        nothing) or a source of `find_images`. It is read when its turn comes, and sent in a
        request of its own. `images` of the result tells each one's
        width, height and format.

        The server fetches nothing: urls are fetched here, by the configuration's `urls`.

        Args:
            images: the images; one alone is a call of one.
            deadline_s: longest time that this call may take.
            progress: show a bar, on a terminal.
            asked: `dimensions`, `output_type`, `ranges` and `sticky_key` as of `embed`. `errors`:
                "raise", the first image that is wrong ends the call; "collect", it has no row,
                `errors` of the result has what was wrong with it by its place, and `indices` the
                places of the others.

        Raises:
            InvalidImage: an image cannot be read or decoded.
            ImageTooLarge: an image has too many bytes or pixels.
            UrlRefused: a url is not https, or leads to an address that is not public.
            FetchFailed: a url gave no image, or not in time.
            UnsupportedInput: the model embeds no images.
            HalimedeError: as `embed`.
        """
        return self._embed("image", image_inputs(images), deadline_s, progress, **asked)

    def embed_multimodal(
        self,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageLike | None] | None,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **asked: Unpack[AskedOfPairs],
    ) -> Embeddings:
        """Embeddings of texts with the images at the same places, one vector a pair.

        Args:
            texts: the texts; None, or None in a place: there is none.
            images: the images, as of `embed_images`; None likewise.
            deadline_s: longest time that this call may take.
            progress: show a bar, on a terminal.
            asked: as of `embed_images`, and `input_type` as of `embed`.

        Raises:
            InvalidInput: texts and images are of different number, or a place has neither.
            HalimedeError: as `embed_images`.
        """
        return self._embed("pair", pair_inputs(texts, images), deadline_s, progress, **asked)

    def embed_iter(
        self,
        texts: Iterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **asked: Unpack[AskedOfTexts],
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
            asked: `input_type`, `dimensions`, `output_type`, `ranges` and `sticky_key` as of
                `embed`.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as `embed`.
        """
        stream = Stream(window, encode_text)
        return self._embed_iter("text", stream, texts, deadline_s, progress, **asked)

    def embed_images_iter(
        self,
        images: Iterable[ImageLike],
        *,
        window: int = IMAGES_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **asked: Unpack[AskedOfImages],
    ) -> Iterator[Embeddings]:
        """Embeddings of a stream of images of any length, such as those of a folder or an archive
        (`find_images`), part by part, in its order.

        As `embed_iter`: images are read when their turn comes, 16 at a time, so memory stays
        bounded. `indices` and `errors` of each part count from the stream's first
        image.

        Args:
            images: the images, as of `embed_images`; taken in the caller's thread.
            window: images in one part.
            progress: show a bar, on a terminal.
            deadline_s: longest time that one part may take.
            asked: as of `embed_images`.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as `embed_images`.
        """
        stream = Stream(window, lambda image, _: image_input(image))
        return self._embed_iter("image", stream, images, deadline_s, progress, **asked)

    def _embed(
        self,
        kind: InputKind,
        items: Sequence[Input],
        deadline_s: float | None,
        progress: bool,
        **asked: Any,
    ) -> Embeddings:
        with bar(progress, len(items)) as advance:
            on_progress = advance if progress else None
            call = self._call(kind, items, deadline_s, on_progress=on_progress, **asked)
            return self._loop.wait(self._flow.embed(call))

    def _embed_iter(
        self,
        kind: InputKind,
        stream: Stream,
        items: Iterable[Any],
        deadline_s: float | None,
        progress: bool,
        **asked: Any,
    ) -> Iterator[Embeddings]:
        with bar(progress) as advance, contextlib.closing(stream):
            for part in stream.cut(items):
                call = self._call(kind, part, deadline_s, first=stream.first(part), **asked)
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
        **asked: Unpack[AskedOfTexts],
    ) -> Embeddings:
        """As `Embedder.embed`."""
        encoded = encode_texts([texts] if isinstance(texts, str) else texts)
        return await self._embed("text", encoded, deadline_s, progress, **asked)

    async def embed_images(
        self,
        images: Sequence[ImageLike] | ImageLike,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **asked: Unpack[AskedOfImages],
    ) -> Embeddings:
        """As `Embedder.embed_images`."""
        return await self._embed("image", image_inputs(images), deadline_s, progress, **asked)

    async def embed_multimodal(
        self,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageLike | None] | None,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **asked: Unpack[AskedOfPairs],
    ) -> Embeddings:
        """As `Embedder.embed_multimodal`."""
        return await self._embed("pair", pair_inputs(texts, images), deadline_s, progress, **asked)

    def embed_iter(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **asked: Unpack[AskedOfTexts],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_iter`, of a stream of either kind."""
        stream = Stream(window, encode_text)
        return self._embed_iter("text", stream, texts, deadline_s, progress, **asked)

    def embed_images_iter(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        window: int = IMAGES_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **asked: Unpack[AskedOfImages],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_sourcesiter`, of a stream of either kind."""
        stream = Stream(window, lambda image, _: image_input(image))
        return self._embed_iter("image", stream, images, deadline_s, progress, **asked)

    async def _embed(
        self,
        kind: InputKind,
        items: Sequence[Input],
        deadline_s: float | None,
        progress: bool,
        **asked: Any,
    ) -> Embeddings:
        with bar(progress, len(items)) as advance:
            on_progress = advance if progress else None
            call = self._call(kind, items, deadline_s, on_progress=on_progress, **asked)
            return await asyncio.wrap_future(self._loop.submit(self._flow.embed(call)))

    async def _embed_iter(
        self,
        kind: InputKind,
        stream: Stream,
        items: Iterable[Any] | AsyncIterable[Any],
        deadline_s: float | None,
        progress: bool,
        **asked: Any,
    ) -> AsyncIterator[Embeddings]:
        with bar(progress) as advance, contextlib.closing(stream):
            async for part in stream.cut_async(items):
                call = self._call(kind, part, deadline_s, first=stream.first(part), **asked)
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
    fetch = Fetch(config.urls)
    if config.cache is None:
        return Flow(chain, statistics, fetch)
    return Flow(chain, statistics, fetch, config.cache.open(), config.cache.model_check_s)


def _own_options(provider: Provider) -> Options:
    return Options.model_validate({"provider": "own", "model_id": provider.name})
