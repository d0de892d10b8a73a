"""A model of the repository, run in this process by the operations that Triton's backends run."""

from __future__ import annotations

import asyncio
import json
import os
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, PositiveInt

from halimede.config.environment import Settings
from halimede.extras import import_optional
from halimede.inputs.content import InputKind
from halimede.providers import input_kinds
from halimede.providers.answers import unknown_tokens
from halimede.providers.base import Answer, Request, reindexed
from halimede.providers.base import Options as BaseOptions
from halimede.providers.http_errors import timed_out
from halimede.providers.probe import PROBES
from halimede.results import IMAGE, MAX_IMAGE_BYTES, ServedModel
from halimede_ops import errors, vectors
from halimede_repository import configs

MAX_BATCH_SIZE = 256
"""Texts in one request. The engine splits them into micro-batches itself."""
DEVICES = {
    "cpu": (),
    "openvino": ("openvino",),
    "cuda": ("cuda",),
    "tensorrt": ("tensorrt", "cuda"),
}
"""Accelerators of a device, best first. None of them is onnxruntime's own CPU engine."""
MAX_TWO_SESSIONS_BYTES = 256_000_000
"""Largest model.onnx that gets a second session, which takes that memory again."""
MEMORY_WORDS = ("memory", "alloc")
"""Words in onnxruntime's errors when an allocation fails."""
T = TypeVar("T")


class Options(BaseOptions):
    """A model of the repository, run in this process."""

    provider: str = "onnx"
    path: Path = Field(default_factory=lambda: Settings().repository)
    """Model repository: the folder that Triton serves."""
    device: Literal["auto", "cpu", "openvino", "cuda", "tensorrt"] = "auto"
    """Where the model runs. auto: CUDA if installed, else OpenVINO, else onnxruntime on CPU."""
    threads: PositiveInt | None = None
    """CPU threads. None: all that this process may use."""
    streams: PositiveInt | None = None
    """Micro-batches that run at once and share the threads. 1 has the lowest latency for a single
    text; many have the highest throughput. None: one per thread, and for a small model a second
    session that runs a lone text on all threads."""


def connect(options: Options) -> Onnx:
    """Return the provider for these options. The model is opened on first use."""
    import_optional("onnxruntime", "onnx")
    import_optional("tokenizers", "onnx")
    return Onnx(options)


class _Stamp(NamedTuple):
    """State of a model in the repository at one moment, to notice changes."""

    version: configs.Ensemble
    files: tuple[tuple[int, int], ...]
    """Modification time and size of the files that a build could replace in place."""


class _OpenModel(NamedTuple):
    """A model in memory."""

    served: ServedModel
    spec: Any
    reader: Any
    """A TextTokenizer for texts, an ImageReader for images, the _FusedModels for pairs."""
    engine: _Engine | None
    """The running model. None for pairs."""
    stamp: _Stamp


class _Engine:
    """A SharedEngine that batches the requests of all callers. It ends with the last reference."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        weakref.finalize(self, engine.close)

    async def embed(self, inputs: Sequence[Any], dimensions: int | None) -> Any:
        """Return the `Embeddings` of the inputs, in order, or raise what the run raised."""
        future: Future[Any] = Future()

        def answer(outcome: Any) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self._engine.submit(inputs, dimensions, answer, future.cancelled)
        return await asyncio.wrap_future(future)


class _FusedModels(NamedTuple):
    """A fusion with its text model and its image model."""

    fusion: Any
    text: _OpenModel
    image: _OpenModel


class Onnx:
    """A model of a repository in this process, with the image model that it names."""

    def __init__(self, options: Options) -> None:
        self.name = f"onnx:{options.model_id}"
        self._options = options
        self._threads = options.threads or len(os.sched_getaffinity(0))
        self._streams = min(options.streams or self._threads, self._threads)
        self._opening = asyncio.Lock()
        self._open_models: dict[InputKind, _OpenModel] = {}

    async def close(self) -> None:
        """Release the models. A second call does nothing."""
        self._open_models.clear()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """Return the model that its folder holds now. It is opened again if its files changed.

        Raises:
            ModelNotFound: the repository has no such model.
            InvalidModel: one of its files cannot be read.
            UnsupportedInput: neither it nor its image model embeds this kind.
        """
        return (await self._model(kind, timeout_s, check_files=True)).served

    async def health(self, timeout_s: float) -> None:
        """Raise unless a probe can be embedded."""
        kind = (await self.describe(timeout_s)).input
        await self.embed(Request([PROBES[kind]], kind), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """Return the answer of the model in memory."""
        opened = await self._model(request.kind, timeout_s, check_files=False)
        return await self._within(timeout_s, EMBED[request.kind](opened, request))

    async def _model(
        self, kind: InputKind | None, timeout_s: float, *, check_files: bool
    ) -> _OpenModel:
        async with self._opening:
            opened = self._open_models.get(kind) if kind else None
            if opened is None or check_files:
                kind, name = self._ensemble(kind)
                opened = self._open_models.get(kind)
                if opened is None or opened.stamp != self._stamp(name):
                    opening = asyncio.to_thread(self._open, kind, name)
                    opened = await self._within(timeout_s, opening)
                    self._open_models[kind] = opened
            return opened

    def _ensemble(self, kind: InputKind | None) -> tuple[InputKind, str]:
        """Return the kind and name of the ensemble for a kind of inputs.

        It is the configured one, or for images the image model that it names.
        """
        name = self._options.model_id
        config = configs.read(self._options.path, name).config
        own = input_kinds.BY_PARAMETER[configs.parameter(config, "input") or "text"]
        image_model = configs.parameter(config, "image_model")
        if kind == "image" and own == "text" and image_model:
            return kind, image_model
        if kind not in (None, own):
            raise input_kinds.unsupported(kind, self.name, own)
        return own, name

    async def _within(self, timeout_s: float, work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, timeout_s)
        except TimeoutError:
            raise timed_out(self.name, timeout_s) from None

    def _open(self, kind: InputKind, name: str) -> _OpenModel:
        stamp = self._stamp(name)
        try:
            opened = self._read(kind, name, stamp)
        except errors.InvalidModel:
            if self._stamp(name) == stamp:
                raise
            opened = None
        if opened is None or self._stamp(name) != stamp:
            raise errors.ModelChanged(f"{self.name} changed while it was opened. Send again.")
        return opened

    def _read(self, kind: InputKind, name: str, stamp: _Stamp) -> _OpenModel:
        from halimede_engine import engine, scheduler, session
        from halimede_ops import spec

        steps = stamp.version.steps
        facts = spec.load(stamp.version.folder)
        served = self._served(kind, name, stamp.version, facts)
        if kind == "pair":
            return _OpenModel(served, facts, self._fused_models(stamp.version), None, stamp)
        reader, make_rows = self._reader(kind, facts, steps)
        model = steps[f"{name}-onnx"] / session.FILE_NAME
        names = self._accelerators()
        accelerators = [session.Accelerator(name) for name in names]
        on_cpu = not {"cuda", "tensorrt"} & set(names)
        is_tight = on_cpu and served.precision in session.TIGHT_PADDING

        def open_session(streams: int) -> tuple[Any, list[str]]:
            return session.open_session(
                model,
                accelerators,
                self._threads,
                streams,
                facts.max_tokens,
                tight_padding=is_tight and streams == 1,
            )

        opened, missing = open_session(self._streams)
        if missing and self._options.device != "auto":
            raise errors.MissingExtra(
                f"this onnxruntime cannot run on {', '.join(missing)}. Install "
                f"{_package(missing[0])}, or set device to cpu."
            )
        run = run_alone = opened.run_together
        if on_cpu and self._opens_twice(session.file_bytes(model)):
            adaptive = session.AdaptiveSession(opened, lambda: open_session(1)[0])
            run, run_alone = adaptive.run_together, adaptive.run_alone
        shared = scheduler.Scheduler(
            run,
            opened.plan,
            self._streams,
            make_rows=make_rows,
            run_alone=run_alone,
            cancel_check_runs=0,
        )
        shared_engine = _Engine(engine.SharedEngine(shared, facts))
        return _OpenModel(served, facts, reader, shared_engine, stamp)

    def _opens_twice(self, size_bytes: int) -> bool:
        shared = self._options.streams is None and self._streams > 1
        return shared and size_bytes <= MAX_TWO_SESSIONS_BYTES

    def _fused_models(self, version: configs.Ensemble) -> _FusedModels:
        """Open a fusion with the two models that it was made for."""
        from halimede_ops import fusion

        loaded = fusion.load(version.folder)
        text, image = self._open("text", loaded.text_model), self._open("image", loaded.image_model)
        for model in (text, image):
            expected = configs.parameter(version.config, f"{model.served.input}_version")
            if model.stamp.version.folder.name != expected:
                raise errors.InvalidModel(
                    f"{model.served.name} is not the version that the fusion was made for. Make "
                    "the fusion again."
                )
        return _FusedModels(loaded, text, image)

    def _reader(
        self, kind: InputKind, facts: Any, steps: Mapping[str, Path]
    ) -> tuple[Any, Callable[[Sequence[Any]], Sequence[Any]]]:
        """Return the reader of inputs, and the function from what it read to the engine's rows."""
        from halimede_engine import engine

        if kind == "image":
            import_optional("PIL", "images")
            from halimede_engine.image_reader import ImageReader

            reader = ImageReader(facts.images(), self._threads)
            return reader, engine.image_rows(facts.images())
        from halimede_ops import text

        tokenizer = text.load(steps[f"{facts.name}-tokenizer"], facts)
        return tokenizer, engine.text_rows(tokenizer)

    def _served(
        self, kind: InputKind, name: str, version: configs.Ensemble, facts: Any
    ) -> ServedModel:
        quality = json.loads((version.folder / "quality.json").read_text())
        if quality["space"] != facts.space:
            raise errors.InvalidModel(
                f"the quality record of {name} is of another space; build the model again."
            )
        image = None if kind == "text" else facts.image
        return ServedModel(
            name=name,
            space=facts.space,
            precision=quality["precision"],
            dims=facts.dims,
            max_tokens=0 if kind == "image" else facts.max_tokens,
            max_batch_size=MAX_BATCH_SIZE,
            provider="onnx",
            mean_cosine=quality.get("mean_cosine"),
            version=version.folder.name if configs.versions(version.config) else "",
            input=kind,
            image_model=configs.parameter(version.config, "image_model"),
            max_image_bytes=MAX_IMAGE_BYTES if image is None else image.max_image_bytes,
        )

    def _stamp(self, name: str) -> _Stamp:
        from halimede_engine import session

        version = configs.read(self._options.path, name)
        files = [version.folder / "spec.json", version.folder / "quality.json"]
        for step, folder in version.steps.items():
            if "-onnx" in step:
                files += session.files(folder / session.FILE_NAME)
        try:
            return _Stamp(version, tuple((s.st_mtime_ns, s.st_size) for s in map(os.stat, files)))
        except OSError:
            raise configs.not_built(name) from None

    def _accelerators(self) -> Sequence[str]:
        if self._options.device != "auto":
            return DEVICES[self._options.device]
        onnxruntime: ModuleType = import_optional("onnxruntime", "onnx")
        available = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" in available:
            return DEVICES["cuda"]
        return DEVICES["openvino" if "OpenVINOExecutionProvider" in available else "cpu"]


async def _embed_texts(opened: _OpenModel, request: Request) -> Answer:
    """Tokenize, run, truncate, normalise, as the three steps on Triton."""
    from halimede_ops import text

    texts = input_kinds.texts_of(request, opened.served.name)
    decoded = [text.decode(value, row, opened.spec) for row, value in enumerate(texts)]
    prompted = opened.reader.prompted(decoded, [request.input_type or None] * len(decoded))
    embeddings = await _run(opened, prompted, request.dimensions)
    return Answer(embeddings.vectors, embeddings.tokens, opened.served)


async def _embed_images(opened: _OpenModel, request: Request) -> Answer:
    """Decode, resize, run, truncate, normalise, as the three steps on Triton."""
    pictures = await asyncio.to_thread(lambda: list(opened.reader.read(request.inputs)))
    pixels = [picture.pixels for picture in pictures]
    embeddings = await _run(opened, pixels, request.dimensions)
    facts = [(picture.width, picture.height, picture.format.encode()) for picture in pictures]
    return Answer(
        embeddings.vectors,
        unknown_tokens(len(pictures)),
        opened.served,
        np.array(facts, IMAGE),
    )


async def _embed_pairs(opened: _OpenModel, request: Request) -> Answer:
    """Embed each pair's text and image, fuse, truncate, normalise, as the fusion on Triton."""
    fused = await asyncio.gather(
        *[_fused(opened.reader, row, pair, request) for row, pair in enumerate(request.inputs)]
    )
    return Answer(
        vectors.embed(np.concatenate(fused), opened.spec, request.dimensions),
        unknown_tokens(len(fused)),
        opened.served,
    )


async def _fused(models: _FusedModels, row: int, pair: Any, request: Request) -> np.ndarray:
    """Vector `[1, dims]` of the pair in a row of the request."""
    text = image = None
    with reindexed([row]):
        if pair.text is not None:
            text_request = Request([pair.text], "text", request.input_type)
            text = (await _embed_texts(models.text, text_request)).vectors
        if pair.image is not None:
            image = (await _embed_images(models.image, Request([pair.image], "image"))).vectors
    return vectors.fuse(text, image, models.fusion)


EMBED: Mapping[InputKind, Callable[[_OpenModel, Request], Awaitable[Answer]]] = {
    "text": _embed_texts,
    "image": _embed_images,
    "pair": _embed_pairs,
}


async def _run(opened: _OpenModel, inputs: Sequence[Any], dimensions: int | None) -> Any:
    assert opened.engine is not None
    try:
        return await opened.engine.embed(inputs, dimensions)
    except (MemoryError, errors.InvalidDimensions):
        raise
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        if any(word in str(error).lower() for word in MEMORY_WORDS):
            raise MemoryError from None
        raise errors.ServerError(
            f"{opened.served.name} could not be run ({type(error).__name__})."
        ) from None


def _package(accelerator: str) -> str:
    return "onnxruntime-openvino" if accelerator == "openvino" else "onnxruntime-gpu"
