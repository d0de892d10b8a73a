"""A model of the repository, run in this process by the operations that Triton's backends run."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future as ConcurrentFuture
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from pydantic import Field, PositiveInt

from halimede.config.environment import Settings
from halimede.extras import import_optional
from halimede.inputs.content import (
    OUTPUT_OF,
    TEXT_KINDS,
    InputKind,
    ModelKind,
    OutputKind,
    Pair,
    SpannedText,
)
from halimede.pipeline.batching import IMAGES_IN_FLIGHT
from halimede.pipeline.forks import ForkGate
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import Mapped, completed
from halimede.pipeline.waiting import Future
from halimede.providers import input_kinds
from halimede.providers.answers import (
    multi_rows,
    padded_spans,
    span_rows,
    sparse_rows,
    unknown_tokens,
)
from halimede.providers.base import Answer, Request, reindexed
from halimede.providers.base import Options as BaseOptions
from halimede.results import IMAGE, MAX_IMAGE_BYTES, ServedModel
from halimede_engine import cores
from halimede_ops import errors, maxsim, spans, vectors
from halimede_ops.spec import MULTI_VECTOR, POOLED_TOKENS, SPARSE
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
HEADS: Mapping[str, OutputKind] = {
    SPARSE: "sparse",
    MULTI_VECTOR: "multi",
    POOLED_TOKENS: "spans",
}
"""Further head of a dense model → what it gives."""
EXIT_WAIT_S = 10.0
"""Maximum time that the end of a program waits for a model that is being opened."""


class Options(BaseOptions):
    """A model of the repository, run in this process."""

    provider: str = "onnx"
    path: Path = Field(default_factory=lambda: Settings().repository)
    """Model repository: the folder that Triton serves."""
    device: Literal["auto", "cpu", "openvino", "cuda", "tensorrt"] = "auto"
    """Where the model runs. auto: CUDA if installed, else OpenVINO, else onnxruntime on CPU."""
    threads: PositiveInt | None = None
    """CPU threads. None: one for each core that this process may use, by its CPU affinity and the
    CPU quota of its cgroup."""
    streams: PositiveInt | None = None
    """Micro-batches that run at once and share the threads. 1 has the lowest latency for a single
    text; many have the highest throughput. None: one per thread, and for a small model a second
    session that runs a lone text on all threads."""


def connect(options: Options) -> list[Onnx]:
    """Return the provider for these options. The model is opened on first use."""
    import_optional("onnxruntime", "onnx")
    import_optional("tokenizers", "onnx")
    return [Onnx(options)]


_runs = ForkGate()
"""A child that is forked during a run of onnxruntime or OpenVINO may hang in its own."""


_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep_sessions() -> None:
    """In a forked child, never release the parent's sessions: they would wait for their threads."""
    for session in list(_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


os.register_at_fork(after_in_child=_keep_sessions)


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
    """A TextTokenizer for texts, an ImageReader for images, the _FusedModels for pairs, a dict of
    tower → _OpenModel for a router, the _ScoringModel of a reranker by multi-vectors."""
    engine: Any
    """The SharedEngine that runs the model. It ends with the last reference. None for a model that
    asks others."""
    stamp: _Stamp
    decode: Callable[[Any, int, Any], str]
    """`halimede_ops.text.decode`, which needs the package tokenizers."""

    def close(self) -> None:
        """Stop the engine's threads. Its memory is released with the last reference."""
        if self.engine is not None:
            self.engine.close()
        elif isinstance(self.reader, dict):
            for tower in self.reader.values():
                tower.close()
        else:
            for model in self.reader.models:
                model.close()


class _FusedModels(NamedTuple):
    """A fusion with its text model and its image model."""

    fusion: Any
    text: _OpenModel
    image: _OpenModel

    @property
    def models(self) -> tuple[_OpenModel, ...]:
        """The models that it asks."""
        return self.text, self.image


class _ScoringModel(NamedTuple):
    """The model whose multi-vectors score pairs of a query and a document."""

    model: _OpenModel

    @property
    def models(self) -> tuple[_OpenModel, ...]:
        """The models that it asks."""
        return (self.model,)


class Onnx:
    """A model of a repository in this process, with the image model that it names."""

    def __init__(self, options: Options) -> None:
        self.name = f"onnx:{options.model_id}"
        self._options = options
        self._threads = options.threads or cores.available()
        self._streams = min(options.streams or self._threads, self._threads)
        self._opener = Pool(1, "open")
        self._workers = Pool(IMAGES_IN_FLIGHT, "decode")
        self._lock = threading.Lock()
        """Guards all attributes below."""
        self._open_models: dict[InputKind, _OpenModel] = {}
        self._closed = False

    def close(self) -> None:
        """Release the models and the threads. A second call does nothing."""
        self._opener.close()
        self._workers.close()
        with self._lock:
            self._closed = True
            opened = list(self._open_models.values())
            self._open_models.clear()
        for model in opened:
            model.close()

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Start to read the model that its folder holds now. It is opened again if files changed.

        An opening goes on when its caller has given up: the next call finds the model open.

        Raises:
            ModelNotFound: the repository has no such model.
            InvalidModel: one of its files cannot be read.
            UnsupportedInput: neither it nor its image model embeds this kind.
        """
        return Mapped(self._opener.submit(self._current, kind), lambda done: done.result().served)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Start to embed a request by the model in memory, or by the folder's if none is open.

        Raises:
            ModelChanged: `request.model` has another space or precision than that model.
        """
        opened = self._open_models.get(_slot(request.kind))
        if opened is None:
            return self._workers.submit(self._embed_first, request)
        return self._start(opened, request)

    def _embed_first(self, request: Request) -> Answer:
        opened = self._opener.submit(self._current, request.kind).result()
        return self._start(opened, request._replace(may_block=False)).result()

    def _start(self, opened: _OpenModel, request: Request) -> Future[Answer]:
        expected = request.model
        if (
            expected is not None
            and expected is not opened.served
            and not expected.is_alike(opened.served)
        ):
            raise errors.ModelChanged(f"{self.name} changed its model. Send again.")
        if isinstance(opened.reader, _ScoringModel):
            embed = _score_pairs
        elif request.kind in TEXT_KINDS:
            return _start_texts(opened, request)
        else:
            embed = _embed_images if request.kind == "image" else _embed_pairs
        if request.may_block:
            return completed(embed(opened, request))
        return self._workers.submit(embed, opened, request)

    def _current(self, kind: InputKind | None) -> _OpenModel:
        """Return the model that the folder holds now. Only the opener's one thread calls this."""
        kind, name = self._ensemble(kind)
        opened = self._open_models.get(_slot(kind))
        if opened is None or opened.stamp != self._stamp(name):
            with _finished_before_exit():
                opened = self._open(kind, name)
            with self._lock:
                if not self._closed:
                    self._open_models[_slot(kind)] = opened
        return opened

    def _ensemble(self, kind: InputKind | None) -> tuple[InputKind, str]:
        """Return the kind and name of the ensemble for a kind of inputs.

        It is the configured one, or for images the image model that it names.
        """
        name = self._options.model_id
        config = configs.read(self._options.path, name).config
        model_kind = cast(ModelKind, configs.parameter(config, "kind") or "dense")
        own = input_kinds.input_of(model_kind, configs.parameter(config, "input"))
        image_model = configs.parameter(config, "image_model")
        if kind == "image" and own == "text" and image_model:
            return kind, image_model
        if not input_kinds.is_of(kind, own):
            assert kind is not None
            raise input_kinds.unsupported(kind, self.name, own, model_kind)
        return own, name

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
        from halimede_ops.text import decode

        steps = stamp.version.steps
        facts = spec.load(stamp.version.folder)
        served = self._served(kind, name, stamp.version, facts)
        others = self._others(kind, facts, stamp.version)
        if others is not None:
            return _OpenModel(served, facts, others, None, stamp, decode)
        reader, make_rows = self._reader(kind, facts, steps)
        model = steps[f"{name}-onnx"] / session.FILE_NAME
        names = self._accelerators()
        accelerators = _accelerators(names, stamp.version)
        threads = self._threads  # `open_session` must not keep self: the engine's threads keep it
        on_cpu = not {"cuda", "tensorrt"} & set(names)
        is_tight = on_cpu and served.precision in session.TIGHT_PADDING

        def open_session(streams: int) -> tuple[Any, list[str]]:
            tight = is_tight and streams == 1
            with _runs.work():
                result = session.open_session(
                    model, accelerators, threads, streams, facts.max_tokens, tight_padding=tight
                )
            _sessions.add(result[0])
            return result

        opened, missing = open_session(self._streams)
        if missing and self._options.device != "auto":
            raise errors.MissingExtra(
                f"this onnxruntime cannot run on {', '.join(missing)}. Install "
                f"{_package(missing[0])}, or set device to cpu."
            )
        run = run_alone = opened.run_outputs
        if on_cpu and self._opens_twice(session.file_bytes(model)):
            adaptive = session.AdaptiveSession(opened, lambda: open_session(1)[0])
            run, run_alone = adaptive.run_together, adaptive.run_alone
        shared = scheduler.Scheduler(
            _runs.around(run),
            opened.plan,
            self._streams,
            make_rows=make_rows,
            size_bytes=(lambda item: 0) if kind == "image" else engine.text_bytes,
            run_alone=_runs.around(run_alone),
            cancel_check_runs=0,
        )
        shared_engine = engine.SharedEngine(shared, facts)
        return _OpenModel(served, facts, reader, shared_engine, stamp, decode)

    def _opens_twice(self, size_bytes: int) -> bool:
        shared = self._options.streams is None and self._streams > 1
        return shared and size_bytes <= MAX_TWO_SESSIONS_BYTES

    def _others(self, kind: InputKind, facts: Any, version: configs.Ensemble) -> Any:
        """Open the models that a model asks; None for a model that runs itself."""
        if kind == "pair":
            return self._fused_models(version)
        if facts.routes:
            return self._towers(version)
        if configs.parameter(version.config, "model"):
            return self._scoring_model(version)
        return None

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

    def _towers(self, version: configs.Ensemble) -> dict[str, _OpenModel]:
        """Open the models that a router calls, in the versions that it was built with."""
        towers = {}
        for key in configs.TOWERS:
            tower = key.removesuffix("_model")
            opened = self._open("text", configs.parameter(version.config, key))
            expected = configs.parameter(version.config, f"{tower}_version")
            if opened.stamp.version.folder.name != expected:
                raise errors.InvalidModel(
                    f"{opened.served.name} is not the version that the router was built with. "
                    "Build the model again."
                )
            towers[tower] = opened
        return towers

    def _scoring_model(self, version: configs.Ensemble) -> _ScoringModel:
        """Open the model by whose multi-vectors a reranker scores pairs."""
        opened = self._open("text", configs.parameter(version.config, "model"))
        if opened.stamp.version.folder.name != configs.parameter(version.config, "model_version"):
            raise errors.ModelChanged(
                f"{opened.served.name} is not served in the version that {self.name} was made for. "
                "Send again."
            )
        return _ScoringModel(opened)

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
        quality = _quality(version)
        if quality["space"] != facts.space:
            raise errors.InvalidModel(
                f"the quality record of {name} is of another space; build the model again."
            )
        image = None if kind in TEXT_KINDS else facts.image
        further = [output for head, output in HEADS.items() if head in facts.heads]
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
            kind=facts.kind,
            query_tokens=facts.late.query_tokens if facts.late else 0,
            outputs=tuple(dict.fromkeys([OUTPUT_OF[facts.kind], *further])),
            labels=facts.labels,
            arithmetic=quality.get("arithmetic", ""),
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


def _accelerators(names: Sequence[str], version: configs.Ensemble) -> list[Any]:
    """Return accelerators that compute in the arithmetic that the build measured.

    OpenVINO is left out for a model that the build found it cannot run.
    """
    from halimede_engine import arithmetic, session

    quality = _quality(version)
    if quality.get("engine") == "cpu":
        names = [name for name in names if name != "openvino"]
    asked = arithmetic.properties(quality.get("arithmetic", arithmetic.F32))
    return [session.Accelerator(name, asked if name == "openvino" else {}) for name in names]


def _quality(version: configs.Ensemble) -> dict[str, Any]:
    """Return the quality record of an ensemble."""
    record: dict[str, Any] = json.loads((version.folder / "quality.json").read_text())
    return record


def _slot(kind: InputKind) -> InputKind:
    """Key of the open model for a kind of inputs: texts and text pairs have the same."""
    return "text" if kind in TEXT_KINDS else kind


def _start_texts(opened: _OpenModel, request: Request) -> Future[Answer]:
    """Tokenize, run, truncate, normalise, as the three steps on Triton."""
    served = opened.served
    if opened.spec.routes:
        opened = opened.reader[opened.spec.tower(request.input_type or None)]
    if request.output == "spans":
        return _start_spans(opened, request)
    parts = [request.inputs] if request.kind == "text" else zip(*request.inputs, strict=True)
    firsts, *seconds = (
        [opened.decode(value, row, opened.spec) for row, value in enumerate(values)]
        for values in parts
    )
    input_types = [request.input_type or None] * len(firsts)
    prompted = opened.reader.prompted(firsts, input_types, *seconds)
    return _run(
        opened,
        prompted,
        request,
        lambda done: Answer(_vectors(done, request.output), done.tokens, served),
    )


def _start_spans(opened: _OpenModel, request: Request) -> Future[Answer]:
    """Tokenize, run, pool the tokens of each span, normalise, as the three steps on Triton."""
    given = cast("Sequence[SpannedText]", request.inputs)
    texts = [opened.decode(one.text, row, opened.spec) for row, one in enumerate(given)]
    checked = spans.check(padded_spans(given), texts)
    input_types = [request.input_type or None] * len(texts)
    prompted = opened.reader.prompted(texts, input_types, None, checked)

    def answer(done: Any) -> Answer:
        rows = span_rows(done.heads["SPAN_EMBEDDINGS"], done.heads["SPAN_WEIGHTS"], given)
        return Answer(rows, done.tokens, opened.served)

    return _run(opened, prompted, request, answer)


def _score_pairs(opened: _OpenModel, request: Request) -> Answer:
    """Embed each query and each document once, and compare their vectors, as `maxsim` on Triton."""
    model: _OpenModel = opened.reader.model
    queries, documents = (
        [opened.decode(value, row, opened.spec) for row, value in enumerate(values)]
        for values in zip(*request.inputs, strict=True)
    )
    pairs = maxsim.distinct(queries, documents)
    prompted = model.reader.prompted(pairs.texts, pairs.input_types)

    def scored(done: Any) -> Answer:
        matrices = maxsim.without_padding(done.heads["MULTI_VECTORS"])
        scores = maxsim.score_pairs(matrices, pairs)
        return Answer(scores[:, None], done.tokens[pairs.documents], opened.served)

    return _run(model, prompted, request, scored).result()


def _vectors(done: Any, output: OutputKind) -> np.ndarray:
    """The vectors of an `Answer`, from the engine's embeddings."""
    if output == "sparse":
        return sparse_rows(done.heads["SPARSE_IDS"], done.heads["SPARSE_WEIGHTS"])
    if output == "multi":
        return multi_rows(done.heads["MULTI_VECTORS"])
    vectors: np.ndarray = done.vectors
    return vectors


def _embed_images(opened: _OpenModel, request: Request) -> Answer:
    """Decode, resize, run, truncate, normalise, as the three steps on Triton."""
    images = cast(Sequence[bytes], request.inputs)
    if len(images) == 1:
        pictures = [opened.reader.prepare(images[0])]
    else:
        pictures = list(opened.reader.read(images))
    facts = [(picture.width, picture.height, picture.format.encode()) for picture in pictures]
    pixels = [picture.pixels for picture in pictures]
    count = unknown_tokens(len(pictures))
    return _run(
        opened,
        pixels,
        request,
        lambda done: Answer(done.vectors, count, opened.served, np.array(facts, IMAGE)),
    ).result()


def _embed_pairs(opened: _OpenModel, request: Request) -> Answer:
    """Embed the texts and the images, fuse, truncate, normalise, as the fusion on Triton."""
    models: _FusedModels = opened.reader
    pairs = cast(Sequence[Pair], request.inputs)
    texts = [row for row, pair in enumerate(pairs) if pair.text is not None]
    images = [row for row, pair in enumerate(pairs) if pair.image is not None]
    by_row: list[dict[int, np.ndarray]] = [{}, {}]
    with reindexed(texts):
        if texts:
            inputs = cast(Sequence[bytes], [pairs[row].text for row in texts])
            part = Request(inputs, "text", request.input_type)
            answer = _start_texts(models.text, part).result()
            by_row[0] = dict(zip(texts, answer.vectors[:, None], strict=True))
    with reindexed(images):
        if images:
            inputs = cast(Sequence[bytes], [pairs[row].image for row in images])
            answer = _embed_images(models.image, Request(inputs, "image"))
            by_row[1] = dict(zip(images, answer.vectors[:, None], strict=True))
    fused = [
        vectors.fuse(by_row[0].get(row), by_row[1].get(row), models.fusion)
        for row in range(len(pairs))
    ]
    return Answer(
        vectors.embed(np.concatenate(fused), opened.spec, request.dimensions),
        unknown_tokens(len(fused)),
        opened.served,
    )


def _run(
    opened: _OpenModel, inputs: Sequence[Any], request: Request, to_answer: Callable[[Any], Answer]
) -> Future[Answer]:
    """Run in the caller's thread if it may block and the engine is idle, else with others."""
    if request.may_block:
        try:
            embeddings = opened.engine.embed_now(inputs, request.dimensions)
        except Exception as error:
            raise _engine_error(error, opened.served.name) from None
        if embeddings is not None:
            return completed(to_answer(embeddings))
    future: ConcurrentFuture[Any] = ConcurrentFuture()

    def answer(outcome: Any) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            future.set_exception(_engine_error(outcome, opened.served.name))
        else:
            future.set_result(outcome)

    opened.engine.submit(inputs, request.dimensions, answer, future.cancelled)
    return Mapped(future, lambda done: to_answer(done.result()))


def _engine_error(error: Exception, name: str) -> Exception:
    """Return the error to raise for one of a run."""
    if isinstance(error, (MemoryError, errors.HalimedeError)):
        return error
    # onnxruntime raises its own, undocumented classes.
    if any(word in str(error).lower() for word in MEMORY_WORDS):
        return MemoryError()
    return errors.ServerError(f"{name} could not be run ({type(error).__name__}).")


@contextlib.contextmanager
def _finished_before_exit() -> Iterator[None]:
    """Let the end of the program wait for what this thread does.

    A thread that is ended inside onnxruntime aborts the process.
    """
    pid, done = os.getpid(), threading.Event()

    def wait() -> None:
        if os.getpid() == pid:  # a forked child has no such thread
            done.wait(EXIT_WAIT_S)

    atexit.register(wait)
    try:
        yield
    finally:
        done.set()
        atexit.unregister(wait)


def _package(accelerator: str) -> str:
    return "onnxruntime-openvino" if accelerator == "openvino" else "onnxruntime-gpu"
