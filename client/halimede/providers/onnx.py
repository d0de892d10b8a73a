"""A model of the repository in this process: the operations that Triton's backends run."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from halimede.items import Kind
from halimede.providers import base
from halimede.providers.base import Answer, Request, optional, too_late
from halimede.providers.base import Options as BaseOptions
from halimede.results import ServedModel
from halimede.settings import Settings
from halimede_ops import errors, pins, vectors

MAX_BATCH_SIZE = 256
"""Texts in one request: the engine cuts them into micro-batches itself."""
DEVICES = {
    "cpu": (),
    "openvino": ("openvino",),
    "cuda": ("cuda",),
    "tensorrt": ("tensorrt", "cuda"),
}
"""Execution accelerators of a device, best first; none is onnxruntime's own CPU engine."""
PARAMETERS: Mapping[str, Mapping[str, str]] = {
    # OpenVINO keeps 5000 compiled kernels and their memory: 10 MiB more after 1000 mixed texts in
    # INT8. Few texts in ever new shapes take 5 % more CPU with 128; with 64, 100 texts take 4 %.
    "openvino": {"CPU_RUNTIME_CACHE_CAPACITY": "128"},
}
"""Parameters of an accelerator in a process that is not the model's alone."""
CODE_OF_MEMORY = ("memory", "alloc")
"""Words of onnxruntime's errors when an allocation fails."""


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
    """Micro-batches at once, sharing the threads; None: one a thread. One gives a single text
    soonest, many give most texts a second."""


def connect(options: Options) -> Onnx:
    """The provider for these options; the model itself is opened on first use."""
    optional("onnxruntime", "onnx")
    optional("tokenizers", "onnx")
    return Onnx(options)


class _Stamp(NamedTuple):
    """What the repository serves under a name at one moment."""

    pinned: pins.Served
    files: tuple[tuple[int, int], ...]
    """Time and size of the files that a build could replace in place."""


class _Opened(NamedTuple):
    """A model in memory."""

    served: ServedModel
    spec: Any
    tokenizer: Any
    session: Any
    stamp: _Stamp


class Onnx:
    """One model of a repository, in this process."""

    def __init__(self, options: Options) -> None:
        self.name = f"onnx:{options.model_id}"
        self._options = options
        self._threads = options.threads or len(os.sched_getaffinity(0))
        self._streams = min(options.streams or self._threads, self._threads)
        self._workers = ThreadPoolExecutor(self._streams, thread_name_prefix="halimede-onnx")
        self._opening = asyncio.Lock()
        self._opened: _Opened | None = None

    async def close(self) -> None:
        """Forget the model; a second call does nothing."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._opened = None

    async def describe(self, timeout_s: float, kind: Kind | None = None) -> ServedModel:
        """The model as its folder is now; opened again when its files changed.

        Raises:
            ModelNotFound: the repository has no such model.
            InvalidModel: a file of it cannot be read.
        """
        base.check_texts(kind, self.name)
        return (await self._model(timeout_s, again=True)).served

    async def health(self, timeout_s: float) -> None:
        """Nothing when a probe text is embedded."""
        await self.embed(Request([b"health"]), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer of the model in memory."""
        texts = base.texts(request, self.name)
        opened = await self._model(timeout_s, again=False)
        return await self._in_thread(
            timeout_s, _embed, opened, texts, request.input_type, request.dimensions
        )

    async def _model(self, timeout_s: float, *, again: bool) -> _Opened:
        async with self._opening:
            if self._opened is None or (again and self._opened.stamp != self._stamp()):
                self._opened = await self._in_thread(timeout_s, self._open)
            return self._opened

    async def _in_thread(self, timeout_s: float, run: Any, *arguments: Any) -> Any:
        working = asyncio.get_running_loop().run_in_executor(self._workers, run, *arguments)
        try:
            return await asyncio.wait_for(working, timeout_s)
        except asyncio.TimeoutError:
            raise too_late(self.name, timeout_s) from None

    def _open(self) -> _Opened:
        stamp = self._stamp()
        try:
            opened = self._read(stamp)
        except errors.InvalidModel:
            if self._stamp() == stamp:
                raise
            opened = None
        if opened is None or self._stamp() != stamp:
            raise errors.ModelChanged(f"{self.name} was changed while it was opened.")
        return opened

    def _read(self, stamp: _Stamp) -> _Opened:
        from halimede_ops import session, spec, text

        steps = stamp.pinned.steps
        facts = spec.load(stamp.pinned.folder)
        tokenizer = text.load(steps[f"{facts.name}-tokenizer"], facts)
        opened, missing = session.open_session(
            steps[f"{self._options.model_id}-onnx"] / session.FILE_NAME,
            [session.Accelerator(name, PARAMETERS.get(name, {})) for name in self._accelerators()],
            self._threads,
            self._streams,
            facts.max_tokens,
        )
        if missing and self._options.device != "auto":
            raise errors.MissingExtra(
                f"this onnxruntime cannot run on {', '.join(missing)}. Install "
                f"{_package(missing[0])}, or set device to cpu."
            )
        return _Opened(self._served(stamp.pinned, facts), facts, tokenizer, opened, stamp)

    def _served(self, pinned: pins.Served, facts: Any) -> ServedModel:
        quality = json.loads((pinned.folder / "quality.json").read_text())
        if quality["space"] != facts.space:
            raise errors.InvalidModel(
                f"the quality record of {self._options.model_id} is of another space; build the "
                "model again."
            )
        return ServedModel(
            name=self._options.model_id,
            space=facts.space,
            precision=quality["precision"],
            dims=facts.dims,
            max_tokens=facts.max_tokens,
            max_batch_size=MAX_BATCH_SIZE,
            provider="onnx",
            mean_cosine=quality["mean_cosine"],
            version=pinned.folder.name if pins.versions(pinned.config) else "",
        )

    def _stamp(self) -> _Stamp:
        pinned = pins.read(self._options.path, self._options.model_id)
        files = [pinned.folder / "spec.json", pinned.folder / "quality.json"]
        files += [step / "model.onnx" for name, step in pinned.steps.items() if "-onnx" in name]
        try:
            return _Stamp(pinned, tuple((s.st_mtime_ns, s.st_size) for s in map(os.stat, files)))
        except OSError:
            raise pins.not_built(self._options.model_id) from None

    def _accelerators(self) -> Sequence[str]:
        if self._options.device != "auto":
            return DEVICES[self._options.device]
        onnxruntime: ModuleType = optional("onnxruntime", "onnx")
        available = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" in available:
            return DEVICES["cuda"]
        return DEVICES["openvino" if "OpenVINOExecutionProvider" in available else "cpu"]


def _embed(
    opened: _Opened, texts: Sequence[bytes], input_type: str | None, dimensions: int | None
) -> Answer:
    """Tokenize, run, truncate, normalise: what Triton's three steps do."""
    from halimede_ops import session, text

    decoded = [text.decode(value, row, opened.spec) for row, value in enumerate(texts)]
    tokens = opened.tokenizer.encode(decoded, [input_type or None] * len(decoded))
    try:
        pooled = opened.session.run(session.rows(one.ids for one in tokens))
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        if any(word in str(error).lower() for word in CODE_OF_MEMORY):
            raise MemoryError from None
        raise errors.ServerError(
            f"{opened.served.name} could not be run ({type(error).__name__})."
        ) from None
    totals = np.array([one.total for one in tokens], np.int32)
    return Answer(vectors.embed(pooled, opened.spec, dimensions), totals, opened.served)


def _package(accelerator: str) -> str:
    return "onnxruntime-openvino" if accelerator == "openvino" else "onnxruntime-gpu"
