"""Towers: the ways into a model, its texts or a CLIP's images, and what each must reach.

Both towers are built and checked alike. `Engine` runs a built one in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnxruntime

from halimede_engine import arithmetic, cores, engine, session
from halimede_ops import image, text, vectors
from halimede_ops.errors import BuildError, InvalidModel
from halimede_ops.spec import MULTI_VECTOR, PIXELS, QUERY, TOKEN_TYPES, ModelSpec
from halimede_tools.build.kinds.scores import SCORE_BARS
from halimede_tools.build.samples import corpus, pictures

OPENVINO, CPU_ENGINE = "openvino", "cpu"
"""Engines that run a model on a CPU, as quality records name them: OpenVINO, and onnxruntime's own
kernels."""
ACCELERATORS: Mapping[str, tuple[str, ...]] = {OPENVINO: (OPENVINO,), CPU_ENGINE: ()}
"""Engine → execution accelerators of the ONNX step on CPU: in the configs, and in Engine. The build
takes the first engine that gives the model's own results."""
ENGINE_NAMES = {OPENVINO: "OpenVINO", CPU_ENGINE: "onnxruntime's own CPU engine"}
CHECK_SPARSE_TEXTS = 300
"""Texts that a sparse model is checked on: of a vocabulary of 250,002 their vectors take 300 MB."""
CHECK_PICTURES = 132
"""Pictures that a vision tower is checked on: every form, thrice, in different sizes."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a precision must reach to be published."""

    mean_cosine: float
    """Mean cosine to sentence-transformers in float32: over all inputs, and over those of each
    length class."""
    p1_cosine: float
    """The 1st percentile of the same, over the inputs of each length class."""
    invariance: float
    """Lowest cosine of a text alone to the same text in a batch, and in wider padding."""
    size_ratio: float
    """Largest file size against FP32."""


@dataclasses.dataclass(frozen=True)
class SparseBar(Bar):
    """What a precision of a sparse model must reach to be published."""

    same_ids: float
    """Share of inputs with the ids of the reference, weights near 0 left aside."""


BARS = {
    "fp32": Bar(mean_cosine=0.99999, p1_cosine=0.9999, invariance=0.99999, size_ratio=1.0),
    "fp16": Bar(mean_cosine=0.9999, p1_cosine=0.999, invariance=0.9999, size_ratio=0.52),
    "int8": Bar(mean_cosine=0.995, p1_cosine=0.98, invariance=0.9999, size_ratio=0.30),
}
IMAGE_BARS = BARS | {"int8": dataclasses.replace(BARS["int8"], mean_cosine=0.99)}
"""The bars of a vision tower."""

SPARSE_BARS = {
    precision: SparseBar(**dataclasses.asdict(bar), same_ids=0.99 if precision == "fp32" else 0.0)
    for precision, bar in BARS.items()
}
"""The bars of a sparse model. FP32 leaves room for the ids that `max_active_dims` cuts off, where
two weights are equal but for the last bits."""


@dataclasses.dataclass(frozen=True)
class LateBar(Bar):
    """What a precision of a late-interaction model must reach to be published: the cosines are
    those of its vectors, and MaxSim must rank documents alike.
    """

    kendall_tau: float
    """Kendall's tau of the rankings of documents, the mean over all queries."""
    ndcg_10: float
    """NDCG@10 of the same, where the reference's first ten documents have the gains 10, 9, …, 1."""


LATE_BARS = {
    precision: LateBar(
        **dataclasses.asdict(bar),
        kendall_tau=SCORE_BARS[precision].kendall_tau,
        ndcg_10=SCORE_BARS[precision].ndcg_10,
    )
    for precision, bar in BARS.items()
}
"""The bars of a late-interaction model."""

LENGTH_CLASSES = (20, 64)
"""Tokens at which the second and the third length class begin."""


class LengthClass(NamedTuple):
    """The cosines of the inputs of one length class."""

    tokens: str
    """Its lengths, special tokens included, such as `20-63`."""
    inputs: int
    mean_cosine: float
    p1_cosine: float
    """1st percentile."""
    min_cosine: float


def by_length(lengths: Sequence[int], cosines: np.ndarray) -> list[LengthClass]:
    """Divide inputs into length classes, those without inputs left out; cosines `[inputs]`."""
    bounds = [1, *LENGTH_CLASSES]
    names = [f"{first}-{after - 1}" for first, after in zip(bounds, LENGTH_CLASSES, strict=False)]
    names.append(f"{bounds[-1]} and more")
    classes = np.digitize(lengths, LENGTH_CLASSES)
    parts = [(name, cosines[classes == place]) for place, name in enumerate(names)]
    return [length_class(name, part) for name, part in parts if len(part)]


def length_class(tokens: str, cosines: np.ndarray) -> LengthClass:
    """The length class of inputs with these cosines, `[inputs]`."""
    mean, p1, least = cosines.mean(), np.percentile(cosines, 1), cosines.min()
    return LengthClass(tokens, len(cosines), float(mean), float(p1), float(least))


Rows = engine.MakeRows
"""Turns inputs into a model's rows."""


def text_rows(tokenizer_folder: Path, spec: ModelSpec) -> Rows:
    """The function that turns texts into token rows."""
    tokenizer = text.load(tokenizer_folder, spec)
    make_rows = engine.text_rows(tokenizer)
    return lambda texts: make_rows(tokenizer.prompted(texts, [None] * len(texts)))


def pair_rows(tokenizer_folder: Path, spec: ModelSpec) -> Rows:
    """The function that turns texts, or pairs of texts, into token rows."""
    tokenizer = text.load(tokenizer_folder, spec)
    make_rows = engine.text_rows(tokenizer)
    prompt = spec.prompt(None)
    return lambda items: make_rows(
        [prompt + item if isinstance(item, str) else (prompt + item[0], item[1]) for item in items]
    )


def late_rows(tokenizer_folder: Path, spec: ModelSpec) -> Rows:
    """The function that turns queries (`Query`) and documents (strings) into token rows."""
    tokenizer = text.load(tokenizer_folder, spec)
    make_rows = engine.text_rows(tokenizer)
    query, document = spec.prompt(QUERY), spec.prompt("document")
    return lambda items: make_rows(
        [
            text.Query(query + item.text) if isinstance(item, text.Query) else document + item
            for item in items
        ]
    )


def image_rows(_: Path, spec: ModelSpec) -> Rows:
    """The function that turns encoded pictures into rows of pixels."""
    accepted = spec.images()
    make_rows = engine.image_rows(accepted)
    return lambda files: make_rows(
        [image.prepare(file, accepted, row).pixels for row, file in enumerate(files)]
    )


def check_pictures() -> list[bytes]:
    """The pictures that a vision tower is checked on."""
    return pictures.check_pictures(CHECK_PICTURES)


def feed(row: session.Row | session.Pixels) -> dict[str, np.ndarray]:
    """The graph's inputs for one row, without padding."""
    if isinstance(row, session.Pixels):
        return {PIXELS: row.values[None]}
    feeds = {"input_ids": row.ids[None], "attention_mask": row.mask[None]}
    return feeds if row.types is None else feeds | {TOKEN_TYPES: row.types[None]}


@dataclasses.dataclass(frozen=True)
class Tower:
    """One way into a model: its texts, pairs of texts, or a CLIP's images."""

    inputs: str
    """What goes in: `texts`, `pairs`, `labelled texts`, `weighted texts`, `queries and documents`
    or `images`."""
    bars: Mapping[str, Any]
    """Precision → what it must reach."""
    rows: Callable[[Path, ModelSpec], Rows]
    """What makes the rows that the graph in this folder takes."""
    check_inputs: Callable[[], list[Any]]
    """The inputs that vectors are compared on."""
    odd_inputs: int = 0
    """How many of them, at the beginning, are unlike what users send. They count among all inputs,
    but in no length class."""


TEXTS = Tower("texts", BARS, text_rows, corpus.check_texts, len(corpus.ODD_TEXTS))
IMAGES = Tower("images", IMAGE_BARS, image_rows, check_pictures)
PAIRS = Tower("pairs", SCORE_BARS, pair_rows, corpus.check_pairs)
LABELLED = Tower(
    "labelled texts",
    SCORE_BARS,
    pair_rows,
    lambda: corpus.texts_and_pairs(corpus.check_texts(), corpus.check_pairs()),
)
WEIGHTED = Tower(
    "weighted texts",
    SPARSE_BARS,
    text_rows,
    lambda: corpus.check_texts(CHECK_SPARSE_TEXTS),
    len(corpus.ODD_TEXTS),
)
LATE = Tower(
    "queries and documents",
    LATE_BARS,
    late_rows,
    corpus.check_queries_and_documents,
    2 * len(corpus.ODD_TEXTS),
)
TOWERS = {tower.inputs: tower for tower in (TEXTS, IMAGES, PAIRS, LABELLED, WEIGHTED, LATE)}
"""Each tower by its `inputs`."""


class EngineError(BuildError):
    """An engine cannot open a built model, or cannot run it."""


class Engine(engine.Engine):
    """A built model in this process, with the accelerators of the served configs.

    Raises:
        EngineError: the engine cannot open the model. Its runs raise it too.
    """

    def __init__(
        self,
        model: Path,
        rows: Rows,
        spec: ModelSpec,
        computed_in: str = arithmetic.F32,
        name: str = OPENVINO,
    ) -> None:
        asked = arithmetic.properties(computed_in)
        accelerators = [session.Accelerator(each, asked) for each in ACCELERATORS[name]]
        self.name = name
        onnxruntime.set_default_logger_severity(session.LOG_ERRORS)
        self.cores = cores.available()
        with _engine_errors(name, "opened"):
            opened, _ = session.open_session(
                model,
                accelerators,
                self.cores,
                streams=self.cores,
                max_tokens=spec.max_tokens,
                log_severity=session.LOG_FATAL,  # the build says what failed
            )
        super().__init__(opened, rows, spec)

    def embed(self, inputs: Sequence[Any]) -> np.ndarray:
        """As the engine's own; of a late-interaction model the vectors of all inputs, as `run`."""
        return vectors.embed(self.run(self.rows(inputs)), self.spec)

    def run(self, rows: Sequence[session.Row | session.Pixels]) -> np.ndarray:
        """Pooled vectors `[rows, dims]` float32, in order. Of a late-interaction model the vectors
        of all rows, one row after another, `[vectors, dims]`.

        Raises:
            EngineError: the engine cannot run the model.
        """
        if self.spec.late is None:
            with _engine_errors(self.name, "run"):
                return self.session.run(rows)
        parts = self.session.plan([row.length for row in rows], self.cores)
        found = self.run_each([[rows[row] for row in part] for part in parts])
        order = [row for part in parts for row in part]
        return found[np.argsort(self.places(rows, order), kind="stable")]

    def run_each(self, batches: Sequence[Sequence[session.Row | session.Pixels]]) -> np.ndarray:
        """As `run`, of batches that run apart from each other, a stream each at a time."""
        run = self.session.run_together if self.spec.late is None else self._run_late
        with _engine_errors(self.name, "run"), ThreadPoolExecutor(self.cores) as streams:
            return np.concatenate(list(streams.map(run, batches)))

    def counts(self, rows: Sequence[session.Row | session.Pixels]) -> list[int]:
        """Vectors of each row: 1, or of a late-interaction model one for each token it keeps."""
        kept = [getattr(row, "kept", None) for row in rows]
        return [1 if tokens is None else int(tokens.sum()) for tokens in kept]

    def places(
        self, rows: Sequence[session.Row | session.Pixels], order: Sequence[int]
    ) -> np.ndarray:
        """Index in `run` of each vector of the rows in another order."""
        counts = self.counts(rows)
        ends = np.cumsum(counts)
        return np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in order])

    def lengths(self, rows: Sequence[session.Row | session.Pixels]) -> list[int]:
        """Tokens of the row that each vector is of."""
        return np.repeat([row.length for row in rows], self.counts(rows)).tolist()

    def _run_late(self, rows: Sequence[session.Row]) -> np.ndarray:
        found = self.session.run_with_heads(rows)
        return np.concatenate(
            [values[MULTI_VECTOR][row.kept == 1] for row, values in zip(rows, found, strict=True)]
        )


Found = TypeVar("Found")


def with_engine(
    measure: Callable[[Engine], Found], model: Path, rows: Rows, spec: ModelSpec
) -> Found:
    """What `measure` gives with the first engine that can open and run a model.

    Raises:
        EngineError: no engine can.
    """
    failed: list[EngineError] = []
    for name in ACCELERATORS:
        try:
            return measure(Engine(model, rows, spec, name=name))
        except EngineError as error:
            failed.append(error)
    raise no_engine(spec.name, failed)


def no_engine(model: str, failed: Sequence[EngineError]) -> EngineError:
    """The error of a model that no engine can run, of the errors of each engine."""
    return EngineError(
        f"{model} was exported to ONNX, but no engine can run the graph: "
        f"{'; '.join(map(str, failed))}. A graph has the operations that one text took; a model "
        "that decides by the text's values what it computes has no such graph."
    )


@contextlib.contextmanager
def _engine_errors(name: str, doing: str) -> Iterator[None]:
    """Turn what onnxruntime raises into an EngineError."""
    try:
        yield
    except (MemoryError, BuildError):
        raise
    except Exception as error:  # onnxruntime raises undocumented classes of its own
        cause = error.__cause__ if isinstance(error, InvalidModel) and error.__cause__ else error
        raise EngineError(
            f"it cannot be {doing} by {ENGINE_NAMES[name]} ({type(cause).__name__}, "
            f"{_words_of(str(cause))})"
        ) from error


def _words_of(message: str) -> str:
    """The last sentence of an error of onnxruntime or OpenVINO, without signatures and paths."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    # OpenVINO's own message is below the places that passed it on.
    told = [line for line in lines if not re.match(r"Exception from |While validating ", line)]
    words = re.split(r"\[OpenVINO-EP\] | Status Message: |\] : ", told[-1] if told else message)[-1]
    return re.sub(r"\S*/\S*", "…", words).rstrip(".")[:200]
