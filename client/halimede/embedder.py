"""The client: labelled embeddings of texts and images, from a blocking and an asyncio class."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
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


class EmbedOptions(TypedDict, total=False):
    """Options of every call. `Embedder.embed` explains them."""

    dimensions: int | None
    output_type: OutputType
    ranges: np.ndarray | None
    sticky_key: str | None


class TextOptions(EmbedOptions, total=False):
    """Options of a call with texts. `Embedder.embed` explains them."""

    input_type: str | None


class ImageOptions(EmbedOptions, total=False):
    """Options of a call with images. `Embedder.embed_images` explains them."""

    errors: Literal["raise", "collect"]


class PairOptions(TextOptions, ImageOptions, total=False):
    """Options of a call with texts and images."""


class _BaseEmbedder:
    """What both embedders share."""

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
        """Create an embedder. Each provider connects at the first call that needs it.

        Args:
            url: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP. Several
                servers of one model share the load. Default: `HALIMEDE_URL`, else 127.0.0.1:8001.
            model: name of a served model, or of a model in the configuration. Default:
                `HALIMEDE_MODEL`, else the configuration's default model, else all-MiniLM-L6-v2.
            timeout_s: maximum time of one request. Default: `HALIMEDE_TIMEOUT_S`, else 30.
            deadline_s: maximum time of one call. Default: `HALIMEDE_DEADLINE_S`, else none.
            config: a configuration, or the path of its file. Default: `HALIMEDE_CONFIG`.
            providers: your own providers, tried in this order instead of the configuration's
                models.

        Raises:
            InvalidConfig: the configuration or an argument is invalid.
        """
        self.config = resolve(
            config, url=url, model=model, timeout_s=timeout_s, deadline_s=deadline_s
        )
        self._loop = loop.shared()
        self._flow = _flow(self.config, providers)

    def _call(
        self,
        kind: InputKind,
        inputs: Sequence[Input],
        deadline_s: float | None,
        *,
        first: int = 0,
        on_progress: Callable[[int], object] | None = None,
        **options: Unpack[PairOptions],
    ) -> Call:
        output_type = options.get("output_type", "float32")
        ranges = options.get("ranges")
        if output_type in ("int8", "uint8") and ranges is None:
            raise InvalidInput(
                f"{output_type} needs ranges, or vectors of two calls could not be compared. "
                "Measure them once over a hundred texts or more: "
                "halimede_ops.quantise.measure_ranges(result.vectors)."
            )
        return Call(
            inputs,
            kind,
            input_type=options.get("input_type"),
            dimensions=options.get("dimensions"),
            output_type=output_type,
            ranges=ranges,
            deadline_s=self.config.deadline_s if deadline_s is None else deadline_s,
            on_progress=on_progress,
            errors=options.get("errors", "raise"),
            first=first,
            sticky_key=_encode_key(options.get("sticky_key")),
        )


def _encode_key(sticky_key: str | None) -> bytes | None:
    if sticky_key is None:
        return None
    if not isinstance(sticky_key, str):
        raise InvalidInput(f"sticky_key is {type(sticky_key).__name__}; give a str.")
    return sticky_key.encode("utf-8", "surrogatepass")


class Embedder(_BaseEmbedder):
    """Embeds texts and images. Safe to use from several threads.

    >>> with Embedder("127.0.0.1:8001") as embedder:
    ...     result = embedder.embed(["hello world"])
    """

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection. A second call does nothing."""
        self._loop.wait(self._flow.close())

    @property
    def model(self) -> ServedModel:
        """The first provider's current model."""
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
        """Embed texts: vectors `[texts, dims]`, in the texts' order.

        Texts are sent in requests of at most the model's `max_batch_size`. A text beyond the token
        limit is cut off; `truncated` of the result tells which. All vectors of a result have one
        space and precision: if a provider fails midway, the next one embeds the whole call.

        Args:
            texts: the texts. A single string is one text.
            input_type: `query`, `document` or the name of another prompt of the model.
            dimensions: number of leading components to keep (Matryoshka), normalised again.
            output_type: float32, float16, int8, uint8, binary or ubinary.
            ranges: `[2, dims]` of `halimede_ops.quantise.measure_ranges`, for int8 and uint8.
            sticky_key: key that decides whether a canary of the model answers, such as a user's
                id: one version answers all calls with the key. Default: each text's own bytes.
            deadline_s: maximum time of this call.
            progress: show a progress bar on a terminal.

        Raises:
            InvalidText: a text is not a string, or cannot be encoded as UTF-8.
            UnknownInputType: the model has no such prompt.
            InvalidDimensions: `dimensions` is outside 1 … the model's dims.
            InvalidInput: the output type is unknown, or `ranges` is missing.
            ModelNotFound: the server does not have the model.
            ServerError: the server is unreachable, overloaded, or did not answer in time.
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
        **options: Unpack[ImageOptions],
    ) -> Embeddings:
        """Embed images: vectors `[images, dims]`, in the images' order.

        An image is a path, a URL, the bytes of a file, a PIL image (encoded as lossless PNG) or an
        image of `find_images`. Each is read just before it is sent, in a request of its own.
        `images` of the result has each one's width, height and format.

        The client fetches URLs, within the configuration's `urls`. The server fetches nothing.

        Args:
            images: the images. A single image is a call of one.
            deadline_s: maximum time of this call.
            progress: show a progress bar on a terminal.
            options: `dimensions`, `output_type`, `ranges` and `sticky_key` as for `embed`.
                `errors`: "raise" ends the call at the first invalid image. "collect" leaves
                invalid images out: `errors` of the result has their errors by index, and `indices`
                the index of each row.

        Raises:
            InvalidImage: an image cannot be read or decoded.
            ImageTooLarge: an image has too many bytes or pixels.
            UrlRefused: a URL is not https, or leads to an address that is not public.
            FetchFailed: a URL gave no image, or not in time.
            UnsupportedInput: the model does not embed images.
            HalimedeError: as for `embed`.
        """
        return self._embed("image", image_inputs(images), deadline_s, progress, **options)

    def embed_multimodal(
        self,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageLike | None] | None,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **options: Unpack[PairOptions],
    ) -> Embeddings:
        """Embed texts together with the images at the same indices, one vector a pair.

        Args:
            texts: the texts. None, or None at indices without a text.
            images: the images, as for `embed_images`. None, or None at indices without an image.
            deadline_s: maximum time of this call.
            progress: show a progress bar on a terminal.
            options: as for `embed_images`, and `input_type` as for `embed`.

        Raises:
            InvalidInput: the numbers of texts and images differ, or both are None at an index.
            HalimedeError: as for `embed_images`.
        """
        return self._embed("pair", pair_inputs(texts, images), deadline_s, progress, **options)

    def embed_iter(
        self,
        texts: Iterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TextOptions],
    ) -> Iterator[Embeddings]:
        """Embed a stream of texts of any length, part by part, in its order.

        Each part is the result of up to `window` texts. The stream is read at most two parts ahead
        of the part that is awaited, so memory stays bounded. All parts have one space. Their
        precision may differ after a fallback; each part has its own.

        Args:
            texts: the texts. The stream is read in the caller's thread.
            window: texts in one part.
            progress: show a progress bar on a terminal.
            deadline_s: maximum time of one part.
            options: `input_type`, `dimensions`, `output_type`, `ranges` and `sticky_key` as for
                `embed`.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as for `embed`.
        """
        stream = Stream(window, encode_text)
        return self._embed_iter("text", stream, texts, deadline_s, progress, **options)

    def embed_images_iter(
        self,
        images: Iterable[ImageLike],
        *,
        window: int = IMAGES_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[ImageOptions],
    ) -> Iterator[Embeddings]:
        """Embed a stream of images of any length, part by part, in its order.

        A stream is for example `find_images` of a folder or an archive. At most 16 images are read
        at a time, so memory stays bounded. `indices` and `errors` of each part count from the
        first image of the stream.

        Args:
            images: the images, as for `embed_images`. The stream is read in the caller's thread.
            window: images in one part.
            progress: show a progress bar on a terminal.
            deadline_s: maximum time of one part.
            options: as for `embed_images`.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as for `embed_images`.
        """
        stream = Stream(window, lambda image, _: image_input(image))
        return self._embed_iter("image", stream, images, deadline_s, progress, **options)

    def _embed(
        self,
        kind: InputKind,
        inputs: Sequence[Input],
        deadline_s: float | None,
        progress: bool,
        **options: Unpack[PairOptions],
    ) -> Embeddings:
        with bar(progress, len(inputs)) as advance:
            on_progress = advance if progress else None
            call = self._call(kind, inputs, deadline_s, on_progress=on_progress, **options)
            return self._loop.wait(self._flow.embed(call))

    def _embed_iter(
        self,
        kind: InputKind,
        stream: Stream,
        inputs: Iterable[Any],
        deadline_s: float | None,
        progress: bool,
        **options: Unpack[PairOptions],
    ) -> Iterator[Embeddings]:
        with bar(progress) as advance, contextlib.closing(stream):
            for part in stream.cut(inputs):
                call = self._call(kind, part, deadline_s, first=stream.first(part), **options)
                stream.send(self._loop.submit(self._flow.embed(call)))
                if stream.is_full:
                    yield stream.checked(stream.next().result(), advance)
            while stream.is_under_way:
                yield stream.checked(stream.next().result(), advance)

    def clear_cache(self) -> None:
        """Delete every vector from every tier of the cache.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        self._loop.wait(self._flow.clear_cache())

    def health(self) -> list[dict[str, Any]]:
        """Report each provider: whether it embeds a probe text, how fast, and its model."""
        return self._loop.wait(self._flow.health())

    def stats(self) -> dict[str, Any]:
        """Statistics of this embedder so far, as JSON types."""
        return self._loop.wait(self._flow.stats())


class AsyncEmbedder(_BaseEmbedder):
    """`Embedder` for asyncio. Cancelling a call cancels its requests.

    >>> async with AsyncEmbedder("127.0.0.1:8001") as embedder:
    ...     result = await embedder.embed(["hello world"])
    """

    async def __aenter__(self) -> AsyncEmbedder:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection. A second call does nothing."""
        await asyncio.wrap_future(self._loop.submit(self._flow.close()))

    async def describe(self) -> ServedModel:
        """The first provider's current model."""
        return await asyncio.wrap_future(self._loop.submit(self._flow.describe()))

    async def embed(
        self,
        texts: Sequence[str] | str,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **options: Unpack[TextOptions],
    ) -> Embeddings:
        """As `Embedder.embed`."""
        encoded = encode_texts([texts] if isinstance(texts, str) else texts)
        return await self._embed("text", encoded, deadline_s, progress, **options)

    async def embed_images(
        self,
        images: Sequence[ImageLike] | ImageLike,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **options: Unpack[ImageOptions],
    ) -> Embeddings:
        """As `Embedder.embed_images`."""
        return await self._embed("image", image_inputs(images), deadline_s, progress, **options)

    async def embed_multimodal(
        self,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageLike | None] | None,
        *,
        deadline_s: float | None = None,
        progress: bool = False,
        **options: Unpack[PairOptions],
    ) -> Embeddings:
        """As `Embedder.embed_multimodal`."""
        return await self._embed(
            "pair", pair_inputs(texts, images), deadline_s, progress, **options
        )

    def embed_iter(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_iter`, for iterables and async iterables."""
        stream = Stream(window, encode_text)
        return self._embed_iter("text", stream, texts, deadline_s, progress, **options)

    def embed_images_iter(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        window: int = IMAGES_WINDOW,
        progress: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[ImageOptions],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_images_iter`, for iterables and async iterables."""
        stream = Stream(window, lambda image, _: image_input(image))
        return self._embed_iter("image", stream, images, deadline_s, progress, **options)

    async def _embed(
        self,
        kind: InputKind,
        inputs: Sequence[Input],
        deadline_s: float | None,
        progress: bool,
        **options: Unpack[PairOptions],
    ) -> Embeddings:
        with bar(progress, len(inputs)) as advance:
            on_progress = advance if progress else None
            call = self._call(kind, inputs, deadline_s, on_progress=on_progress, **options)
            return await asyncio.wrap_future(self._loop.submit(self._flow.embed(call)))

    async def _embed_iter(
        self,
        kind: InputKind,
        stream: Stream,
        inputs: Iterable[Any] | AsyncIterable[Any],
        deadline_s: float | None,
        progress: bool,
        **options: Unpack[PairOptions],
    ) -> AsyncIterator[Embeddings]:
        with bar(progress) as advance, contextlib.closing(stream):
            async for part in stream.cut_async(inputs):
                call = self._call(kind, part, deadline_s, first=stream.first(part), **options)
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
        """Statistics of this embedder so far, as JSON types."""
        return await asyncio.wrap_future(self._loop.submit(self._flow.stats()))


def _flow(config: Config, providers: Sequence[Provider]) -> Flow:
    statistics = Statistics()
    if providers:
        links = [Link(_default_options(provider), statistics, provider) for provider in providers]
    else:
        links = [Link(options, statistics) for options in config.chain()]
    chain = Chain(links, config.rules())
    fetch = Fetch(config.urls)
    if config.cache is None:
        return Flow(chain, statistics, fetch)
    return Flow(chain, statistics, fetch, config.cache.open(), config.cache.model_check_s)


def _default_options(provider: Provider) -> Options:
    return Options.model_validate({"provider": "own", "model_id": provider.name})
