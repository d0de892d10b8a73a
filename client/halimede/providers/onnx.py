"""A model of the repository in this process: the operations that Triton's backends run."""

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
from halimede.inputs.items import Kind
from halimede.providers import base
from halimede.providers.base import Answer, Request, optional, too_late
from halimede.providers.base import Options as BaseOptions
from halimede.results import IMAGE, MAX_IMAGE_BYTES, ServedModel
from halimede_ops import errors, vectors
from halimede_repository import configs

MAX_BATCH_SIZE = 256
"""Texts in one request: the engine cuts them into micro-batches itself."""
DEVICES = {
    "cpu": (),
    "openvino": ("openvino",),
    "cuda": ("cuda",),
    "tensorrt": ("tensorrt", "cuda"),
}
"""Execution accelerators of a device, best first; none is onnxruntime's own CPU engine."""
MOST_OPENED_TWICE_BYTES = 256_000_000
"""Size of the largest model.onnx that is opened twice: it takes that memory again."""
CODE_OF_MEMORY = ("memory", "alloc")
"""Words of onnxruntime's errors when an allocation fails."""
T = TypeVar("T")


class Options(BaseOptions):
    """A model of the repository, run in this process."""

    provider: str = "onnx"
    path: Path = Field(default_factory=lambda: Settings().repository)
    """Model repository: the folder that Triton serves."""
    device: Literal["auto", "cpu", "openvino", "cuda", "tensorrt"] = "auto"
    """What runs it; auto: CUDA where it is installed, else OpenVINO, else onnxruntime's CPU."""
    threads: PositiveInt | None = None
    """CPU threads; None: as many as this process may use."""
    streams: PositiveInt | None = None
    """Micro-batches at once, sharing the threads; None: one a thread, and all threads for a lone
    text after the first few, from a second copy of a small model. One gives a single text soonest,
    many give most texts a second."""


def connect(options: Options) -> Onnx:
    """The provider for these options; the model itself is opened on first use."""
    optional("onnxruntime", "onnx")
    optional("tokenizers", "onnx")
    return Onnx(options)


class _Stamp(NamedTuple):
    """What the repository serves under a name at one moment."""

    pinned: configs.Ensemble
    files: tuple[tuple[int, int], ...]
    """Time and size of the files that a build could replace in place."""


class _Opened(NamedTuple):
    """An ensemble in memory."""

    served: ServedModel
    spec: Any
    reader: Any
    """What reads its items: a TextTokenizer or an ImageReader; of pairs the Halves."""
    engine: _Engine | None
    """What embeds them; None for pairs."""
    stamp: _Stamp


class _Engine:
    """A SharedEngine that is closed when nobody has it any more."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        weakref.finalize(self, engine.close)

    async def embed(self, inputs: Sequence[Any], dimensions: int | None) -> Any:
        """The `Embeddings` of the inputs, in order; what running them raised is raised."""
        waiting: Future[Any] = Future()

        def answer(outcome: Any) -> None:
            if not waiting.set_running_or_notify_cancel():
                return
            if isinstance(outcome, Exception):
                waiting.set_exception(outcome)
            else:
                waiting.set_result(outcome)

        self._engine.submit(inputs, dimensions, answer, waiting.cancelled)
        return await asyncio.wrap_future(waiting)


class _Halves(NamedTuple):
    """What a fusion is made of."""

    fusion: Any
    text: _Opened
    image: _Opened


class Onnx:
    """One model of a repository, in this process: what embeds its texts, and its images."""

    def __init__(self, options: Options) -> None:
        self.name = f"onnx:{options.model_id}"
        self._options = options
        self._threads = options.threads or len(os.sched_getaffinity(0))
        self._streams = min(options.streams or self._threads, self._threads)
        self._opening = asyncio.Lock()
        self._opened: dict[Kind, _Opened] = {}

    async def close(self) -> None:
        """Forget the model; a second call does nothing."""
        self._opened.clear()

    async def describe(self, timeout_s: float, kind: Kind | None = None) -> ServedModel:
        """The model as its folder is now; opened again when its files changed.

        Raises:
            ModelNotFound: the repository has no such model.
            InvalidModel: a file of it cannot be read.
            UnsupportedInput: it embeds no items of this kind, nor does the model it names.
        """
        return (await self._model(kind, timeout_s, again=True)).served

    async def health(self, timeout_s: float) -> None:
        """Nothing when a probe is embedded."""
        kind = (await self.describe(timeout_s)).input
        await self.embed(Request([base.PROBES[kind]], kind), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer of the model in memory."""
        opened = await self._model(request.kind, timeout_s, again=False)
        return await self._within(timeout_s, EMBED[request.kind](opened, request))

    async def _model(self, kind: Kind | None, timeout_s: float, *, again: bool) -> _Opened:
        async with self._opening:
            opened = self._opened.get(kind) if kind else None
            if opened is None or again:
                kind, name = self._ensemble(kind)
                opened = self._opened.get(kind)
                if opened is None or opened.stamp != self._stamp(name):
                    opening = asyncio.to_thread(self._open, kind, name)
                    opened = await self._within(timeout_s, opening)
                    self._opened[kind] = opened
            return opened

    def _ensemble(self, kind: Kind | None) -> tuple[Kind, str]:
        """The ensemble that embeds items of this kind: the one that is named, or the one that it
        names for images.
        """
        name = self._options.model_id
        config = configs.read(self._options.path, name).config
        own = base.KINDS_BY_INPUT[configs.parameter(config, "input") or "text"]
        image_model = configs.parameter(config, "image_model")
        if kind == "image" and own == "text" and image_model:
            return kind, image_model
        if kind not in (None, own):
            raise base.unsupported(kind, self.name, own)
        return own, name

    async def _within(self, timeout_s: float, working: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(working, timeout_s)
        except asyncio.TimeoutError:
            raise too_late(self.name, timeout_s) from None

    def _open(self, kind: Kind, name: str) -> _Opened:
        stamp = self._stamp(name)
        try:
            opened = self._read(kind, name, stamp)
        except errors.InvalidModel:
            if self._stamp(name) == stamp:
                raise
            opened = None
        if opened is None or self._stamp(name) != stamp:
            raise errors.ModelChanged(f"{self.name} was changed while it was opened.")
        return opened

    def _read(self, kind: Kind, name: str, stamp: _Stamp) -> _Opened:
        from halimede_engine import engine, scheduler, session
        from halimede_ops import spec

        steps = stamp.pinned.steps
        facts = spec.load(stamp.pinned.folder)
        served = self._served(kind, name, stamp.pinned, facts)
        if kind == "pair":
            return _Opened(served, facts, self._halves(stamp.pinned), None, stamp)
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
        return _Opened(served, facts, reader, _Engine(engine.SharedEngine(shared, facts)), stamp)

    def _opens_twice(self, size_bytes: int) -> bool:
        shared = self._options.streams is None and self._streams > 1
        return shared and size_bytes <= MOST_OPENED_TWICE_BYTES

    def _halves(self, pinned: configs.Ensemble) -> _Halves:
        """The fusion, with the two models that it was made for."""
        from halimede_ops import fusion

        made = fusion.load(pinned.folder)
        text, image = self._open("text", made.text_model), self._open("image", made.image_model)
        for half in (text, image):
            wanted = configs.parameter(pinned.config, f"{half.served.input}_version")
            if half.stamp.pinned.folder.name != wanted:
                raise errors.InvalidModel(
                    f"{half.served.name} is not of the version that the fusion was made for; make "
                    "the fusion again."
                )
        return _Halves(made, text, image)

    def _reader(
        self, kind: Kind, facts: Any, steps: Mapping[str, Path]
    ) -> tuple[Any, Callable[[Sequence[Any]], Sequence[Any]]]:
        """What reads items as they come, and what makes rows of what it read."""
        from halimede_engine import engine

        if kind == "image":
            optional("PIL", "images")
            from halimede_engine.image_reader import ImageReader

            reader = ImageReader(facts.images(), self._threads)
            return reader, engine.image_rows(facts.images())
        from halimede_ops import text

        tokenizer = text.load(steps[f"{facts.name}-tokenizer"], facts)
        return tokenizer, engine.text_rows(tokenizer)

    def _served(self, kind: Kind, name: str, pinned: configs.Ensemble, facts: Any) -> ServedModel:
        quality = json.loads((pinned.folder / "quality.json").read_text())
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
            version=pinned.folder.name if configs.versions(pinned.config) else "",
            input=kind,
            image_model=configs.parameter(pinned.config, "image_model"),
            max_image_bytes=MAX_IMAGE_BYTES if image is None else image.max_image_bytes,
        )

    def _stamp(self, name: str) -> _Stamp:
        from halimede_engine import session

        pinned = configs.read(self._options.path, name)
        files = [pinned.folder / "spec.json", pinned.folder / "quality.json"]
        for step, folder in pinned.steps.items():
            if "-onnx" in step:
                files += session.files(folder / session.FILE_NAME)
        try:
            return _Stamp(pinned, tuple((s.st_mtime_ns, s.st_size) for s in map(os.stat, files)))
        except OSError:
            raise configs.not_built(name) from None

    def _accelerators(self) -> Sequence[str]:
        if self._options.device != "auto":
            return DEVICES[self._options.device]
        onnxruntime: ModuleType = optional("onnxruntime", "onnx")
        available = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" in available:
            return DEVICES["cuda"]
        return DEVICES["openvino" if "OpenVINOExecutionProvider" in available else "cpu"]


async def _embed_texts(opened: _Opened, request: Request) -> Answer:
    """Tokenize, run, truncate, normalise: what Triton's three steps do."""
    from halimede_ops import text

    texts = base.texts(request, opened.served.name)
    decoded = [text.decode(value, row, opened.spec) for row, value in enumerate(texts)]
    prompted = opened.reader.prompted(decoded, [request.input_type or None] * len(decoded))
    embeddings = await _run(opened, prompted, request.dimensions)
    return Answer(embeddings.vectors, embeddings.tokens, opened.served)


async def _embed_images(opened: _Opened, request: Request) -> Answer:
    """Decode, resize, run, truncate, normalise: what Triton's three steps do."""
    pictures = await asyncio.to_thread(lambda: list(opened.reader.read(request.items)))
    embeddings = await _run(opened, [one.pixels for one in pictures], request.dimensions)
    facts = [(one.width, one.height, one.format.encode()) for one in pictures]
    return Answer(
        embeddings.vectors,
        base.unknown_tokens(len(pictures)),
        opened.served,
        np.array(facts, IMAGE),
    )


async def _embed_pairs(opened: _Opened, request: Request) -> Answer:
    """Embed what each pair has, fuse, truncate, normalise: what Triton's fusion does."""
    fused = await asyncio.gather(*[_fused(opened.reader, pair, request) for pair in request.items])
    return Answer(
        vectors.embed(np.concatenate(fused), opened.spec, request.dimensions),
        base.unknown_tokens(len(fused)),
        opened.served,
    )


async def _fused(halves: _Halves, pair: Any, request: Request) -> np.ndarray:
    """`[1, dims]` of one pair."""
    text = image = None
    if pair.text is not None:
        asked = Request([pair.text], "text", request.input_type)
        text = (await _embed_texts(halves.text, asked)).vectors
    if pair.image is not None:
        image = (await _embed_images(halves.image, Request([pair.image], "image"))).vectors
    return vectors.fuse(text, image, halves.fusion)


EMBED: Mapping[Kind, Callable[[_Opened, Request], Awaitable[Answer]]] = {
    "text": _embed_texts,
    "image": _embed_images,
    "pair": _embed_pairs,
}


async def _run(opened: _Opened, inputs: Sequence[Any], dimensions: int | None) -> Any:
    assert opened.engine is not None
    try:
        return await opened.engine.embed(inputs, dimensions)
    except (MemoryError, errors.InvalidDimensions):
        raise
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        if any(word in str(error).lower() for word in CODE_OF_MEMORY):
            raise MemoryError from None
        raise errors.ServerError(
            f"{opened.served.name} could not be run ({type(error).__name__})."
        ) from None


def _package(accelerator: str) -> str:
    return "onnxruntime-openvino" if accelerator == "openvino" else "onnxruntime-gpu"
