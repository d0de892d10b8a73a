"""The client: labelled embeddings of texts and images, from a blocking and an asyncio class."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import os
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
from typing import Any, Literal, Self, TypedDict, TypeVar

import numpy as np
from typing_extensions import Unpack

from halimede.config.resolve import resolve
from halimede.config.schema import Config
from halimede.documents import embedding
from halimede.documents.chunking import DOCUMENT, Chunk, Chunker, chunker_of
from halimede.documents.embedding import Cut, find_tokenizer
from halimede.documents.parts import Spans
from halimede.inputs.content import Input, plural
from halimede.inputs.images import ImageLike, image_input, image_inputs, pair_inputs
from halimede.inputs.options import check_options, check_progress, check_window
from halimede.inputs.texts import encode_text, encode_texts, refuse_async, stream_of
from halimede.inputs.urls import Fetch
from halimede.observability.progress import NO_PROGRESS, Progress, bar
from halimede.pipeline import tasks
from halimede.pipeline.batching import WINDOWS_IN_FLIGHT
from halimede.pipeline.pipeline import Call, Pipeline
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import Lifetime
from halimede.pipeline.stream import Stream
from halimede.pipeline.tasks import Task
from halimede.pipeline.waiting import drive, drive_async
from halimede.providers import Options, Provider
from halimede.results import (
    DocumentEmbeddings,
    Embeddings,
    MultiEmbeddings,
    Result,
    ServedModel,
    SparseEmbeddings,
)
from halimede_ops.errors import InvalidConfig
from halimede_ops.quantise import OutputType

R = TypeVar("R", bound=Result)
STREAM_WINDOW = 1024
"""Texts in one part of a stream."""
IMAGES_WINDOW = 64
"""Images in one part of a stream."""
PROVIDER = ("name", "describe", "embed", "close")
"""Attributes that a provider must have."""


class CallOptions(TypedDict, total=False):
    """Options of every call. `Embedder.embed` explains them."""

    sticky_key: str | None
    deadline_s: float | None


class FurtherOptions(CallOptions, total=False):
    """Options of a call for further outputs of texts. `Embedder.embed` explains them."""

    input_type: str | None


class EmbedOptions(CallOptions, total=False):
    """Options of every call for vectors. `Embedder.embed` explains them."""

    dimensions: int | None
    output_type: OutputType
    ranges: np.ndarray | None


class TextOptions(EmbedOptions, total=False):
    """Options of a call with texts. `Embedder.embed` explains them."""

    input_type: str | None


class ImageOptions(EmbedOptions, total=False):
    """Options of a call with images. `Embedder.embed_images` explains them."""

    errors: Literal["raise", "collect"]


class PairOptions(TextOptions, ImageOptions, total=False):
    """Options of a call with texts and images."""


class ClientArguments(TypedDict, total=False):
    """Further arguments of every client. `Embedder` explains them."""

    timeout_s: float | None
    deadline_s: float | None
    config: Config | Mapping[str, Any] | Path | str | None
    providers: Sequence[Provider]


class BaseClient:
    """What embedders, rerankers and classifiers share, blocking or not.

    Each process has its own pipeline, also after a fork.
    """

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
        """Prepare the providers. Each connects at the first call that needs it.

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
        resolved = resolve(config, url=url, model=model, timeout_s=timeout_s, deadline_s=deadline_s)
        self._set_up(resolved, _checked(providers))

    def _set_up(self, config: Config, providers: tuple[Provider, ...]) -> None:
        self.config = config
        self._providers = providers
        self._is_closed = False
        self._pipelines = {os.getpid(): self._open()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Connections, models and caches stay here. A copy opens its own.
        return _restored, (type(self), self.config, self._providers)

    @property
    def _pipeline(self) -> Pipeline:
        """This process's pipeline. That of a parent process is never used, nor released."""
        pipeline = self._pipelines.get(os.getpid())
        if pipeline is None:
            pipeline = self._pipelines.setdefault(os.getpid(), self._open())
            if self._is_closed:
                pipeline.close()
        return pipeline

    def current_stats(self) -> dict[str, Any]:
        """Statistics of this object so far, as JSON types, of either class without waiting."""
        return self._pipeline.stats()

    def _open(self) -> Pipeline:
        config = self.config
        own = [
            Options.model_validate({"provider": "own", "model_id": provider.name})
            for provider in self._providers
        ]
        return Pipeline(
            own or config.chain(),
            config.rules(),
            Fetch(config.urls),
            providers=self._providers,
            cache=None if config.cache is None else config.cache.open(),
            model_check_s=math.inf if config.cache is None else config.cache.model_check_s,
        )

    def _close(self) -> None:
        self._is_closed = True
        pipeline = self._pipelines.get(os.getpid())
        if pipeline is not None:
            pipeline.close()

    def _call(
        self,
        task: Task[R],
        inputs: Sequence[Input],
        options: Mapping[str, Any],
        progress: Progress,
        first: int = 0,
        may_block: bool = False,
    ) -> Call[R]:
        checked = check_options(task.method, options)
        if checked.deadline_s is None and self.config.deadline_s is not None:
            checked = checked._replace(deadline_s=self.config.deadline_s)
        return Call(inputs, task, checked, first, progress, may_block)


def _checked(providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """Return the providers given.

    Raises:
        InvalidConfig: something is no provider.
    """
    if not isinstance(providers, Iterable):
        raise InvalidConfig(f"providers is {type(providers).__name__}; give a list of providers.")
    for provider in providers:
        lacking = [name for name in PROVIDER if not hasattr(provider, name)]
        if lacking:
            raise InvalidConfig(
                f"providers has a {type(provider).__name__} without {', '.join(lacking)}; see "
                "halimede.Provider."
            )
    return tuple(providers)


def _restored(
    kind: type[BaseClient], config: Config, providers: tuple[Provider, ...]
) -> BaseClient:
    """Make the client of a configuration as it was resolved, without the environment."""
    client = kind.__new__(kind)
    client._set_up(config, providers)
    return client


class BlockingClient(BaseClient):
    """A client that waits for its results. Safe to use from several threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the calls under way, write the cache, and close every connection.

        A second call does nothing.
        """
        self._close()

    @property
    def model(self) -> ServedModel:
        """The first provider's current model."""
        return drive(self._pipeline.describe())

    def clear_cache(self) -> None:
        """Delete every cached value from every tier of the cache.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        self._pipeline.clear_cache()

    def health(self) -> list[dict[str, Any]]:
        """Report each provider: whether it answers a probe, how fast, and its model."""
        return drive(self._pipeline.health())

    def stats(self) -> dict[str, Any]:
        """Statistics of this object so far, as JSON types."""
        return self.current_stats()

    def _run(
        self,
        task: Task[R],
        inputs: Sequence[Input],
        progress: bool,
        options: Mapping[str, Any],
    ) -> R:
        if progress is False:
            call = self._call(task, inputs, options, NO_PROGRESS, may_block=True)
            return drive(self._pipeline.embed(call))
        with bar(check_progress(progress), len(inputs)) as shown:
            return drive(self._pipeline.embed(self._call(task, inputs, options, shown)))


class AsyncClient(BaseClient):
    """A client for asyncio. Cancelling a call cancels its requests."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls under way, write the cache, and close every connection.

        A second call does nothing.
        """
        await asyncio.to_thread(self._close)

    async def describe(self) -> ServedModel:
        """The first provider's current model."""
        return await drive_async(self._pipeline.describe())

    async def clear_cache(self) -> None:
        """Delete every cached value from every tier of the cache.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        await asyncio.to_thread(self._pipeline.clear_cache)

    async def health(self) -> list[dict[str, Any]]:
        """Report each provider: whether it answers a probe, how fast, and its model."""
        return await drive_async(self._pipeline.health())

    async def stats(self) -> dict[str, Any]:
        """Statistics of this object so far, as JSON types."""
        return self.current_stats()

    async def _run(
        self,
        task: Task[R],
        inputs: Sequence[Input],
        progress: bool,
        options: Mapping[str, Any],
    ) -> R:
        with bar(check_progress(progress), len(inputs)) as shown:
            return await drive_async(self._pipeline.embed(self._call(task, inputs, options, shown)))


class ModelFirst(BaseClient):
    """A client whose first argument is the model's name: no model is its default."""

    def __init__(
        self,
        model: str | None = None,
        *,
        url: str | Sequence[str] | None = None,
        **arguments: Unpack[ClientArguments],
    ) -> None:
        """Prepare the providers, as `Embedder` does. Only the first argument differs.

        `Embedder` begins with the server's address, because most servers have one embedding model
        and it is the default. A reranker or a classifier is never the default, so its name comes
        first.

        Args:
            model: name of a served model, or of a model in the configuration.
            url: address of the server, as for `Embedder`. Default: `HALIMEDE_URL`, else
                127.0.0.1:8001.
            arguments: `timeout_s`, `deadline_s`, `config` and `providers`, as for `Embedder`.

        Raises:
            InvalidConfig: the configuration or an argument is invalid.
        """
        super().__init__(url, model, **arguments)


class Embedder(BlockingClient):
    """Embeds texts and images. Safe to use from several threads.

    >>> with Embedder("127.0.0.1:8001") as embedder:
    ...     result = embedder.embed(["hello world"])
    """

    def embed(
        self,
        texts: Iterable[str] | str,
        *,
        progress: bool = False,
        **options: Unpack[TextOptions],
    ) -> Embeddings:
        """Embed texts: vectors `[texts, dims]`, in the texts' order.

        Texts are sent in requests of at most the model's `max_batch_size`. A text beyond the token
        limit is cut off; `truncated` of the result tells which. All vectors of a result have one
        space and precision: if a provider fails midway, the next one embeds the whole call.

        Args:
            texts: the texts. A single string is one text.
            progress: show a progress bar on a terminal.
            input_type: `query`, `document` or the name of another prompt of the model.
            dimensions: number of leading components to keep (Matryoshka), normalised again.
            output_type: float32, float16, int8, uint8, binary or ubinary.
            ranges: `[2, dims]` of `halimede_ops.quantise.measure_ranges`, for int8 and uint8.
            sticky_key: key that decides whether a canary of the model answers, such as a user's
                id: one version answers all calls with the key. Default: each text's own bytes.
            deadline_s: maximum time of this call. Default: that of the embedder.

        Raises:
            InvalidText: a text is not a string, or cannot be encoded as UTF-8.
            UnknownInputType: the model has no such prompt.
            InvalidDimensions: `dimensions` is outside 1 … the model's dims.
            InvalidInput: an option is unknown or invalid, or `ranges` is missing.
            ModelNotFound: the server does not have the model.
            ServerError: the server is unreachable, overloaded, or did not answer in time.
            SpaceRefused: only providers of another space are left.
        """
        return self._run(tasks.EMBED, encode_texts(texts), progress, options)

    def embed_sparse(
        self,
        texts: Iterable[str] | str,
        *,
        progress: bool = False,
        **options: Unpack[FurtherOptions],
    ) -> SparseEmbeddings:
        """Embed texts as weights of tokens: of each text ids `[n]` int32 and weights `[n]` float32.

        Sparse models (SPLADE) give them, and dense models with a sparse head (bge-m3). Batches,
        token limit, cache and fallback are those of `embed`.

        Args:
            texts: the texts. A single string is one text.
            progress: show a progress bar on a terminal.
            options: `input_type`, `sticky_key` and `deadline_s` as for `embed`.

        Raises:
            UnsupportedInput: the model gives no sparse weights.
            HalimedeError: as for `embed`.
        """
        return self._run(tasks.EMBED_SPARSE, encode_texts(texts), progress, options)

    def embed_multi(
        self,
        texts: Iterable[str] | str,
        *,
        progress: bool = False,
        **options: Unpack[FurtherOptions],
    ) -> MultiEmbeddings:
        """Embed texts as one vector for each token: of each text `[n, width]` float32.

        Late-interaction models (ColBERT) give them, and dense models with a multi-vector head
        (bge-m3). `halimede.maxsim` compares them. Batches, token limit, cache and fallback are
        those of `embed`.

        Args:
            texts: the texts. A single string is one text.
            progress: show a progress bar on a terminal.
            options: `input_type`, `sticky_key` and `deadline_s` as for `embed`.

        Raises:
            UnsupportedInput: the model gives no multi-vectors.
            HalimedeError: as for `embed`.
        """
        return self._run(tasks.EMBED_MULTI, encode_texts(texts), progress, options)

    def embed_images(
        self,
        images: Sequence[ImageLike] | ImageLike,
        *,
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
            progress: show a progress bar on a terminal.
            options: `dimensions`, `output_type`, `ranges`, `sticky_key` and `deadline_s` as for
                `embed`.
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
        return self._run(tasks.EMBED_IMAGES, image_inputs(images), progress, options)

    def embed_multimodal(
        self,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageLike | None] | None,
        *,
        progress: bool = False,
        **options: Unpack[PairOptions],
    ) -> Embeddings:
        """Embed texts together with the images at the same indices, one vector a pair.

        Args:
            texts: the texts. None, or None at indices without a text.
            images: the images, as for `embed_images`. None, or None at indices without an image.
            progress: show a progress bar on a terminal.
            options: as for `embed_images`, and `input_type` as for `embed`.

        Raises:
            InvalidInput: the numbers of texts and images differ, or both are None at an index.
            HalimedeError: as for `embed_images`.
        """
        return self._run(tasks.EMBED_MULTIMODAL, pair_inputs(texts, images), progress, options)

    def chunker(
        self, tokens: int | None = None, overlap: int = 0, *, input_type: str | None = DOCUMENT
    ) -> Chunker:
        """Make what cuts texts into chunks for this embedder's model: text → list of `Chunk`.

        It needs the model's tokenizer, which it reads from the model repository on this machine.

        Args:
            tokens: maximum tokens of a chunk, as the model counts them: special tokens and the
                prompt of `input_type` included. Default: the model's token limit.
            overlap: maximum tokens that a chunk has in common with the one before it.
            input_type: input type that the chunks are embedded with.

        Raises:
            InvalidInput: `tokens` or `overlap` is outside what the model allows.
            UnsupportedInput: the provider gives no tokenizer.
            ModelNotFound: the repository on this machine has no such model.
            SpaceRefused: the repository on this machine has another model of this name.
            MissingExtra: the extra `documents` is not installed.
        """
        return drive(embedding.find_chunker(self._pipeline, tokens, overlap, input_type))

    def chunk(
        self,
        text: str,
        tokens: int | None = None,
        overlap: int = 0,
        *,
        input_type: str | None = DOCUMENT,
    ) -> list[Chunk]:
        """Cut a text into chunks that the model takes whole, in its order.

        The text is cut between paragraphs where they fit, else between sentences, words, or within
        a word. `text[chunk.start:chunk.end]` is the chunk. Every character is in a chunk, except
        white space between chunks.

        Args:
            text: the text.
            tokens: maximum tokens of a chunk, as for `chunker`.
            overlap: maximum tokens that a chunk has in common with the one before it.
            input_type: input type that the chunks are embedded with.

        Raises:
            InvalidText: the text is not a string, or has a lone surrogate.
            HalimedeError: as for `chunker`.
        """
        return self.chunker(tokens, overlap, input_type=input_type)(text)

    def embed_documents(
        self,
        texts: Iterable[str] | str,
        *,
        tokens: int | None = None,
        overlap: int = 0,
        late: bool = False,
        window_overlap: int | None = None,
        spans: Spans | None = None,
        progress: bool = False,
        **options: Unpack[TextOptions],
    ) -> DocumentEmbeddings:
        """Embed documents of any length: one vector for each chunk, with its span.

        `documents` of the result has the index of each row's document, and `spans` the start and
        end of its chunk in characters of the document.

        Args:
            texts: the documents. A single string is one document.
            tokens: maximum tokens of a chunk, as for `chunker`.
            overlap: maximum tokens that a chunk has in common with the one before it.
            late: late chunking: the model reads each document as a whole, and the vector of a chunk
                is the mean of its tokens' vectors. It needs a model that was built with
                `--late-chunking`. A document beyond the model's token limit is read in windows.
            window_overlap: tokens that neighbouring windows of late chunking share. Default: a
                quarter of the token limit, at most 512.
            spans: for each document the spans to embed instead of chunks: start and end in
                characters.
            progress: show a progress bar on a terminal.
            options: as for `embed`. The default of `input_type` is `document`.

        Raises:
            InvalidInput: `spans` do not fit the documents.
            InvalidText: a chunk has no token, so that late chunking has no vector for it.
            UnsupportedInput: the model was not built for late chunking.
            HalimedeError: as for `chunker` and `embed`.
        """
        options.setdefault("input_type", DOCUMENT)
        cut = Cut(tokens, overlap, late, window_overlap, spans)
        folder = drive(find_tokenizer(self._pipeline, cut, options["input_type"]))
        call = embedding.prepare(texts, cut, folder, options)
        with call.located():
            answer = self._run(call.task, call.inputs, progress, call.options)
        return call.result(answer)

    def embed_iter(
        self,
        texts: Iterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
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
            options: as for `embed`. `deadline_s` is the maximum time of one part.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as for `embed`.
        """
        return self._embed_iter(
            tasks.EMBED, stream_of(texts, "texts"), encode_text, window, progress, options
        )

    def embed_images_iter(
        self,
        images: Iterable[ImageLike],
        *,
        window: int = IMAGES_WINDOW,
        progress: bool = False,
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
            options: as for `embed_images`. `deadline_s` is the maximum time of one part.

        Raises:
            SpaceRefused: the model's space changed midway.
            HalimedeError: as for `embed_images`.
        """
        return self._embed_iter(
            tasks.EMBED_IMAGES, stream_of(images, "images"), _image_input, window, progress, options
        )

    def _embed_iter(
        self,
        task: Task[Embeddings],
        values: Iterable[Any],
        encode: Callable[[Any, int], Input],
        window: int,
        progress: bool,
        options: Mapping[str, Any],
    ) -> Iterator[Embeddings]:
        refuse_async(values, plural(task.kind))
        self._call(task, (), options, NO_PROGRESS)  # what is invalid is refused here and now
        window, progress = check_window(window), check_progress(progress)
        return self._parts(task, values, encode, window, progress, options)

    def _parts(
        self,
        task: Task[Embeddings],
        values: Iterable[Any],
        encode: Callable[[Any, int], Input],
        window: int,
        progress: bool,
        options: Mapping[str, Any],
    ) -> Iterator[Embeddings]:
        # Parts go on in threads of the stream's own while the caller uses those before.
        pool, lifetime = Pool(WINDOWS_IN_FLIGHT + 1, "stream"), Lifetime()
        with bar(progress) as shown, contextlib.closing(pool), contextlib.closing(lifetime):
            stream: Stream[Any] = Stream(window, encode, shown)
            for part in stream.cut(values):
                call = self._call(task, part, options, NO_PROGRESS, stream.first(part))
                flow = lifetime.run(self._pipeline.embed(call), math.inf)
                stream.send(pool.submit(contextvars.copy_context().run, drive, flow))
                if stream.is_full:
                    yield stream.checked(stream.next().result())
            while stream.is_under_way:
                yield stream.checked(stream.next().result())


class AsyncEmbedder(AsyncClient):
    """`Embedder` for asyncio. Cancelling a call cancels its requests.

    >>> async with AsyncEmbedder("127.0.0.1:8001") as embedder:
    ...     result = await embedder.embed(["hello world"])
    """

    async def embed(
        self,
        texts: Iterable[str] | str,
        *,
        progress: bool = False,
        **options: Unpack[TextOptions],
    ) -> Embeddings:
        """As `Embedder.embed`."""
        return await self._run(tasks.EMBED, encode_texts(texts), progress, options)

    async def embed_sparse(
        self,
        texts: Iterable[str] | str,
        *,
        progress: bool = False,
        **options: Unpack[FurtherOptions],
    ) -> SparseEmbeddings:
        """As `Embedder.embed_sparse`."""
        return await self._run(tasks.EMBED_SPARSE, encode_texts(texts), progress, options)

    async def embed_multi(
        self,
        texts: Iterable[str] | str,
        *,
        progress: bool = False,
        **options: Unpack[FurtherOptions],
    ) -> MultiEmbeddings:
        """As `Embedder.embed_multi`."""
        return await self._run(tasks.EMBED_MULTI, encode_texts(texts), progress, options)

    async def embed_images(
        self,
        images: Sequence[ImageLike] | ImageLike,
        *,
        progress: bool = False,
        **options: Unpack[ImageOptions],
    ) -> Embeddings:
        """As `Embedder.embed_images`."""
        return await self._run(tasks.EMBED_IMAGES, image_inputs(images), progress, options)

    async def embed_multimodal(
        self,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageLike | None] | None,
        *,
        progress: bool = False,
        **options: Unpack[PairOptions],
    ) -> Embeddings:
        """As `Embedder.embed_multimodal`."""
        pairs = pair_inputs(texts, images)
        return await self._run(tasks.EMBED_MULTIMODAL, pairs, progress, options)

    async def chunker(
        self, tokens: int | None = None, overlap: int = 0, *, input_type: str | None = DOCUMENT
    ) -> Chunker:
        """As `Embedder.chunker`."""
        folder = await drive_async(embedding.find_folder(self._pipeline, input_type))
        return await asyncio.to_thread(chunker_of, folder, tokens, overlap, input_type)

    async def chunk(
        self,
        text: str,
        tokens: int | None = None,
        overlap: int = 0,
        *,
        input_type: str | None = DOCUMENT,
    ) -> list[Chunk]:
        """As `Embedder.chunk`."""
        chunker = await self.chunker(tokens, overlap, input_type=input_type)
        return await asyncio.to_thread(chunker, text)

    async def embed_documents(
        self,
        texts: Iterable[str] | str,
        *,
        tokens: int | None = None,
        overlap: int = 0,
        late: bool = False,
        window_overlap: int | None = None,
        spans: Spans | None = None,
        progress: bool = False,
        **options: Unpack[TextOptions],
    ) -> DocumentEmbeddings:
        """As `Embedder.embed_documents`."""
        options.setdefault("input_type", DOCUMENT)
        cut = Cut(tokens, overlap, late, window_overlap, spans)
        folder = await drive_async(find_tokenizer(self._pipeline, cut, options["input_type"]))
        call = await asyncio.to_thread(embedding.prepare, texts, cut, folder, options)
        with call.located():
            answer = await self._run(call.task, call.inputs, progress, call.options)
        return call.result(answer)

    def embed_iter(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        window: int = STREAM_WINDOW,
        progress: bool = False,
        **options: Unpack[TextOptions],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_iter`, for iterables and async iterables."""
        return self._embed_iter(
            tasks.EMBED, stream_of(texts, "texts"), encode_text, window, progress, options
        )

    def embed_images_iter(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        window: int = IMAGES_WINDOW,
        progress: bool = False,
        **options: Unpack[ImageOptions],
    ) -> AsyncIterator[Embeddings]:
        """As `Embedder.embed_images_iter`, for iterables and async iterables."""
        return self._embed_iter(
            tasks.EMBED_IMAGES, stream_of(images, "images"), _image_input, window, progress, options
        )

    def _embed_iter(
        self,
        task: Task[Embeddings],
        values: Iterable[Any] | AsyncIterable[Any],
        encode: Callable[[Any, int], Input],
        window: int,
        progress: bool,
        options: Mapping[str, Any],
    ) -> AsyncIterator[Embeddings]:
        self._call(task, (), options, NO_PROGRESS)  # what is invalid is refused here and now
        window, progress = check_window(window), check_progress(progress)
        return self._parts(task, values, encode, window, progress, options)

    async def _parts(
        self,
        task: Task[Embeddings],
        values: Iterable[Any] | AsyncIterable[Any],
        encode: Callable[[Any, int], Input],
        window: int,
        progress: bool,
        options: Mapping[str, Any],
    ) -> AsyncIterator[Embeddings]:
        with bar(progress) as shown:
            stream: Stream[Any] = Stream(window, encode, shown)
            with contextlib.closing(stream):
                async for part in stream.cut_async(values):
                    call = self._call(task, part, options, NO_PROGRESS, stream.first(part))
                    flow = drive_async(self._pipeline.embed(call))
                    stream.send(asyncio.ensure_future(flow))
                    if stream.is_full:
                        yield stream.checked(await stream.next())
                while stream.is_under_way:
                    yield stream.checked(await stream.next())


def _image_input(image: ImageLike, _: int) -> Input:
    return image_input(image)
