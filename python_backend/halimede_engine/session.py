"""An ONNX model opened by onnxruntime, and how rows run through it.

A row is the tokens of a text, of any length, or the pixels of an image.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime

from halimede_engine import arithmetic, batching, memory
from halimede_ops import spans, sparse, vectors
from halimede_ops.errors import InvalidModel
from halimede_ops.spec import PIXELS, POOLED, POOLED_TOKENS, TOKEN_TYPES

if TYPE_CHECKING:  # images need no tokenizers
    from halimede_ops.text import Tokens

FILE_NAME = "model.onnx"

LONE_RUNS = 8
"""Consecutive lone runs after which AdaptiveSession opens a session that gives each run all
threads: that takes as much time and memory as the first session."""

FIRST_RUNS = 2
"""Runs of a new shape that do not overlap with the first runs of any other shape. With OpenVINO
2025.4, about 1 of 70 processes gave wrong vectors when two streams began with one shape at the same
moment: from then on, one stream gave wrong vectors for every run of that shape."""
FIRST_RUNS_CHECKED = ("1.24.1",)
"""Releases of onnxruntime-openvino with which FIRST_RUNS was checked. 1.24.1 has OpenVINO 2025.4.1.

For another release run `python tests/first_runs.py 200`. If every process with the guard is right,
add the release here. If a process without it is wrong or hangs, the guard is still needed."""
_FIRST_RUN_LOCK = threading.Lock()
"""Held during the first runs of a shape. It belongs to the process, not to a session: some of what
these runs prepare, such as oneDNN's compiled kernels, is shared by all sessions."""

TIGHT_PADDING = ("fp32", "fp16")
"""Precisions that answer a lone text sooner with `tight_padding`: on a CPU, a token of theirs costs
more than a change of shape."""

OnRun = Callable[[int], None]
"""Called before each run with its number of tokens, padding included."""

PACKED = "packed"
"""Metadata key of a model.onnx that takes packed rows: several texts in one row, numbered by the
attention mask."""
SPARSE_ROWS = "sparse_rows"
"""Metadata key of a model.onnx whose pooled vectors are nearly all zeros."""

STATIC = "static"
"""Metadata key of a model.onnx without a transformer: see STATIC_TIMES."""
STATIC_TIMES = 32
"""A micro-batch of a static model has so many times more tokens: a token costs a fraction of what
it costs in a transformer, and a run costs as much."""

LOG_ERRORS, LOG_FATAL = 3, 4
"""onnxruntime's levels of severity: it writes messages of a level and above to the log."""
OPENVINO = "OpenVINOExecutionProvider"
OPENVINO_PROPERTIES = {
    # OpenVINO pins the threads of every process to the same first cores: two instances of one
    # model would share one core and leave the other idle.
    "ENABLE_CPU_PINNING": "NO",
}


def data_of(path: Path) -> Path:
    """The file that holds the weights of a built model.onnx.

    Engines map this file, but copy weights that are inside the protobuf. With its own file a model
    opens sooner and needs less memory.
    """
    return path.with_name(path.name + ".data")


def files(path: Path) -> list[Path]:
    """The files of a model.onnx: its weights, if they have a file of their own, then the graph."""
    data = data_of(path)
    return [data, path] if data.exists() else [path]


def file_bytes(path: Path) -> int:
    """Size of a model.onnx and its weights, in bytes."""
    return sum(part.stat().st_size for part in files(path))


class Accelerator(NamedTuple):
    """An execution accelerator, as config.pbtxt names it."""

    name: str
    parameters: Mapping[str, str] = {}
    """Its parameters; for OpenVINO, properties of the CPU device."""


class Row(NamedTuple):
    """One tokenized text."""

    ids: np.ndarray
    """Token ids `[tokens]` int64."""
    mask: np.ndarray
    """Attention mask `[tokens]` int64: 1 for a token, 0 for padding, -1 for a token that no token
    attends to."""
    total: int = 0
    """Tokens of the whole text; more than `ids` has if the text was truncated. 0: unknown."""
    types: np.ndarray | None = None
    """Token types `[tokens]` int64 of a pair of texts. None: all are 0."""
    kept: np.ndarray | None = None
    """Of a late-interaction model: 1 for each token with a vector in the answer, `[tokens]` int64.
    """
    spans: np.ndarray | None = None
    """Of a model built for late chunking: the tokens of each span, `[spans, 2]` int64. None: the
    caller pools its spans itself."""

    @property
    def length(self) -> int:
        """Tokens of the row, padding included."""
        return len(self.ids)


class Pixels(NamedTuple):
    """One image, as the vision tower takes it."""

    values: np.ndarray
    """`[3, height, width]` uint8."""
    length: int
    """Positions of the vision tower: an image costs as much as a text of so many tokens."""

    @property
    def total(self) -> int:
        """As `length`: an image is never truncated."""
        return self.length


class TextPosition(NamedTuple):
    """Where a text lies in the input arrays of a run."""

    row: int
    start: int
    """Index of the text's first token in the row."""
    number: int
    """Number of texts before it in the same packed row."""


class Layout(NamedTuple):
    """Where all texts lie in the input arrays of a run."""

    positions: list[TextPosition]
    """One for each text, in order."""
    shape: tuple[int, int]
    """Shape of the input arrays: rows, and tokens of each row."""


class Inputs(NamedTuple):
    """The input arrays of a run."""

    positions: list[TextPosition]
    """One for each text or image, in order."""
    feeds: dict[str, np.ndarray]
    """Input name → array."""
    tokens: int
    """Tokens that the run costs, padding included. Images are not padded."""


def token_rows(texts: Iterable[Tokens]) -> list[Row]:
    """Make a row of each tokenized text or pair of texts."""
    return [
        Row(
            np.array(text.ids, np.int64),
            batching.attention(len(text.ids), text.unattended),
            text.total,
            None if text.types is None else np.array(text.types, np.int64),
            None if text.kept is None else np.array(text.kept, np.int64),
            text.spans,
        )
        for text in texts
    ]


def pixel_rows(images: Iterable[np.ndarray], positions: int) -> list[Pixels]:
    """Make a row of each image, `[3, height, width]` uint8, for a vision tower of `positions`."""
    return [Pixels(values, positions) for values in images]


class Session:
    """An opened model.onnx. Safe to call from several threads."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        streams: int,
        max_tokens: int | None,
        micro_batch_tokens: int,
        tight_padding: bool,
        on_run: OnRun,
    ) -> None:
        self._session = session
        self._on_run = on_run
        self._max_tokens = max_tokens
        self._lone_length = batching.tight_length if tight_padding else batching.padded_length
        """Padded length of a row that runs alone."""
        marks = session.get_modelmeta().custom_metadata_map
        self._packed, self._sparse = PACKED in marks, SPARSE_ROWS in marks
        self._micro_batch_tokens = micro_batch_tokens * (STATIC_TIMES if STATIC in marks else 1)
        self._takes_types = TOKEN_TYPES in [node.name for node in session.get_inputs()]
        self.heads = [node.name for node in session.get_outputs() if node.name != POOLED]
        """Names of the outputs with one row for each token."""
        self._streams = streams
        self._threads = ThreadPoolExecutor(streams) if streams > 1 else None
        self._runs: Counter[tuple[int, ...]] = Counter()
        """Shape → number of runs, up to FIRST_RUNS."""

    def plan(self, lengths: Sequence[int], streams: int) -> list[list[int]]:
        """Split rows of these lengths into the cheapest micro-batches, as lists of indices."""
        plan = batching.plan_packed if self._packed else batching.plan
        return plan(lengths, streams, self._micro_batch_tokens)

    def run(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Run rows in micro-batches: pooled vectors `[len(rows), dims]` float32, in order.

        A row's vector does not depend on the other rows, beyond the last bits of float32.
        """
        parts = self.plan([row.length for row in rows], self._streams)
        run = map if self._threads is None else self._threads.map
        results = list(run(lambda part: self.run_together([rows[i] for i in part]), parts))
        out = np.empty((len(rows), results[0].shape[1]), np.float32)
        for part, pooled in zip(parts, results, strict=True):
            out[part] = pooled
        return out

    def run_together(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Run rows as one micro-batch: pooled vectors `[len(rows), dims]` float32, in order.

        A row without a finite vector has NaN or infinity; the other rows are not affected.
        """
        inputs = self._inputs(rows)
        [pooled] = self._outputs([POOLED], inputs)
        pooled = _text_vectors(pooled, inputs.positions)
        for index in _to_run_alone(pooled):
            pooled[index] = self.run_together([rows[index]])[0]
        return pooled

    def run_outputs(self, rows: Sequence[Row | Pixels]) -> Sequence[Any] | np.ndarray:
        """Run rows as one micro-batch: what requests keep of each row until they are answered.

        It is the pooled vector `[dims]` float32; for a model with heads a dict, as `run_with_heads`
        gives; for one with SPARSE_ROWS a SparseRow, which needs far less memory than its vector.
        """
        if self.heads:
            return self.run_with_heads(rows)
        pooled = self.run_together(rows)
        return sparse.from_dense(pooled) if self._sparse else pooled

    def run_with_heads(self, rows: Sequence[Row | Pixels]) -> list[dict[str, np.ndarray]]:
        """Run rows as one micro-batch: every output of each row, by name.

        POOLED is `[dims]` float32; each of `heads` is `[tokens of the row, width]` float32, and of
        a row with spans POOLED_TOKENS is what `halimede_ops.spans.sums` gives for them.
        """
        inputs = self._inputs(rows)
        pooled, *heads = self._outputs([POOLED, *self.heads], inputs)
        named = list(zip(self.heads, heads, strict=True))
        pooled = _text_vectors(pooled, inputs.positions)
        outputs = [
            {POOLED: vector}
            | {name: _head(name, values[at.row, at.start :], row) for name, values in named}
            for row, at, vector in zip(rows, inputs.positions, pooled, strict=True)
        ]
        for index in _to_run_alone(pooled):
            outputs[index] = self.run_with_heads([rows[index]])[0]
        return outputs

    def _outputs(self, names: list[str], inputs: Inputs) -> list[np.ndarray]:
        self._on_run(inputs.tokens)
        shape = next(iter(inputs.feeds.values())).shape
        if self._runs[shape] >= FIRST_RUNS:
            return list(self._session.run(names, inputs.feeds))
        with _FIRST_RUN_LOCK:
            outputs = list(self._session.run(names, inputs.feeds))
            self._runs[shape] += 1
        return outputs

    def _inputs(self, rows: Sequence[Row | Pixels]) -> Inputs:
        """The input arrays of one micro-batch."""
        images = [row.values for row in rows if isinstance(row, Pixels)]
        if images:
            tokens = sum(row.length for row in rows)
            return Inputs(_one_text_per_row(len(rows)), {PIXELS: np.stack(images)}, tokens)
        texts = [row for row in rows if isinstance(row, Row)]
        positions, shape = self._layout(texts)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            feeds[TOKEN_TYPES] = np.zeros(shape, np.int64)
        for text, at in zip(texts, positions, strict=True):
            end = at.start + text.length
            ids[at.row, at.start : end] = text.ids
            mask[at.row, at.start : end] = text.mask * (at.number + 1)
            if self._takes_types and text.types is not None:
                feeds[TOKEN_TYPES][at.row, at.start : end] = text.types
        return Inputs(positions, feeds, math.prod(shape))

    def _layout(self, texts: Sequence[Row]) -> Layout:
        if self._packed:
            # A text that is masked as a whole has no number in the mask: it gets its own row.
            positions = _packed_positions([text.length if text.mask.any() else 0 for text in texts])
        else:
            positions = _one_text_per_row(len(texts))
        longest = max(at.start + text.length for text, at in zip(texts, positions, strict=True))
        rows = max(at.row for at in positions) + 1
        if self._packed and rows > 1:
            return Layout(positions, (rows, batching.packed_length(longest)))
        # In a packed row each text counts its positions from 0: the row may exceed `max_tokens`.
        max_length = None if self._packed else self._max_tokens
        padded_length = batching.padded_length if rows > 1 else self._lone_length
        return Layout(positions, (rows, padded_length(longest, max_length)))


class AdaptiveSession:
    """A shared session, plus, after LONE_RUNS consecutive lone runs, one that gives each run all
    threads. Safe to call from several threads.
    """

    def __init__(self, shared: Session, open_lone: Callable[[], Session]) -> None:
        self._shared = shared
        self._open_lone = open_lone
        self._lone: Session | None = None
        self._lock = threading.Lock()
        """Guards `_lone` and `_lone_runs`."""
        self._lone_runs = 0
        """Consecutive lone runs."""

    def run_together(self, rows: Sequence[Row | Pixels]) -> Sequence[Any] | np.ndarray:
        """Run a micro-batch beside which others may run: as `Session.run_outputs`."""
        with self._lock:
            self._lone_runs = 0
        return self._shared.run_outputs(rows)

    def run_alone(self, rows: Sequence[Row | Pixels]) -> Sequence[Any] | np.ndarray:
        """As `run_together`, for a micro-batch beside which no other is expected to run."""
        with self._lock:
            self._lone_runs += 1
            if self._lone_runs == LONE_RUNS and self._lone is None:
                self._lone = self._open_lone()
            session = self._lone or self._shared
        return session.run_outputs(rows)


def _one_text_per_row(count: int) -> list[TextPosition]:
    return [TextPosition(row, 0, 0) for row in range(count)]


def _packed_positions(lengths: Sequence[int]) -> list[TextPosition]:
    """The position of each text in packed rows, where texts follow each other without a gap."""
    positions = _one_text_per_row(len(lengths))
    for row, texts in enumerate(batching.pack(lengths)):
        start = 0
        for number, text in enumerate(texts):
            positions[text] = TextPosition(row, start, number)
            start += lengths[text]
    return positions


def _text_vectors(pooled: np.ndarray, positions: Sequence[TextPosition]) -> np.ndarray:
    """The vector of each text: `[rows * n, dims]` → `[texts, dims]`.

    A run gives the same number n of vectors for each row, at least as many as the row has texts.
    """
    rows = max(at.row for at in positions) + 1
    vectors_per_row = len(pooled) // rows
    return np.asarray(pooled[[at.row * vectors_per_row + at.number for at in positions]])


def _head(name: str, values: np.ndarray, row: Row | Pixels) -> np.ndarray:
    """What is kept of a head for a row, given the head's values from the row's first token on."""
    own = values[: row.length]
    if name == POOLED_TOKENS and isinstance(row, Row) and row.spans is not None:
        return spans.sums(own, row.spans)  # the run's vectors of tokens can go
    return own


def _to_run_alone(pooled: np.ndarray) -> list[int]:
    """The rows of a run of several whose vectors are not finite: `[rows, dims]` → indices.

    A text with NaN makes its neighbours in a packed row NaN: attention multiplies its values by 0,
    which is NaN again. Only a run of its own says which text is at fault.
    """
    return [] if len(pooled) == 1 else np.flatnonzero(~vectors.are_finite(pooled)).tolist()


def stack_outputs(rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Stack the outputs of rows, which may come from several micro-batches, by name.

    Each row is what `run_together` or `run_with_heads` gave for it. POOLED becomes
    `[len(rows), dims]` float32, a head `[len(rows), longest, width]` float32, zero-padded.
    """
    if not isinstance(rows[0], dict):
        return {POOLED: np.stack(rows)}
    return {
        name: np.stack(values) if name == POOLED else batching.pad_heads(values)
        for name, values in ((name, [row[name] for row in rows]) for name in rows[0])
    }


def open_session(
    path: Path,
    accelerators: Sequence[Accelerator] = (),
    threads: int = 1,
    streams: int = 1,
    max_tokens: int | None = None,
    micro_batch_tokens: int = batching.MICRO_BATCH_TOKENS,
    *,
    tight_padding: bool = False,
    on_run: OnRun = lambda tokens: None,
    log_severity: int = LOG_ERRORS,
) -> tuple[Session, list[str]]:
    """Open a model.onnx; return its session and the accelerators that this onnxruntime lacks.

    The CPU execution provider stands in for a missing accelerator; the caller reports it.

    Args:
        path: the model.onnx.
        accelerators: execution accelerators, the preferred one first.
        threads: CPU threads, shared by all streams.
        streams: micro-batches that run at the same time. More streams give more texts a second,
            fewer give a single text sooner.
        max_tokens: positions of the model; rows are not padded beyond it.
        micro_batch_tokens: maximum tokens of a run of more than one row.
        tight_padding: whether a row that runs alone is padded to `batching.tight_length`.
        on_run: called before each run with its number of tokens, padding included.
        log_severity: what onnxruntime writes to the log, LOG_ERRORS or LOG_FATAL.

    Raises:
        InvalidModel: the file is missing, onnxruntime cannot read it, or an accelerator's name is
            unknown.
    """
    providers, missing = execution_providers(accelerators, threads, streams)
    options = session_options(providers)
    options.log_severity_level = log_severity
    options.intra_op_num_threads = max(1, threads // streams)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises undocumented classes of its own
        raise InvalidModel(
            f"{FILE_NAME} cannot be opened ({type(error).__name__}); build the model again"
        ) from error
    # onnxruntime drops a provider that fails to start, and tries the next.
    lost = [name for name, _ in providers if name not in session.get_providers()]
    if lost:
        raise InvalidModel(f"{FILE_NAME} cannot be run by {', '.join(lost)}; see the server's log")
    _check_signature(session)
    # Compiling the default model in INT8 with OpenVINO took 70 MB more than running it.
    memory.trim()
    return Session(session, streams, max_tokens, micro_batch_tokens, tight_padding, on_run), missing


def session_options(
    providers: Sequence[tuple[str, Mapping[str, str]]],
) -> onnxruntime.SessionOptions:
    """The options to open a model with these execution providers; the threads are not set."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_ERRORS
    # Threads that spin between operators starve the other instances on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if providers[0][0] == OPENVINO:
        # OpenVINO optimises the graph itself; as a rule it takes the whole graph.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def execution_providers(
    accelerators: Sequence[Accelerator], threads: int, streams: int
) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """The execution providers of accelerators, and the names of accelerators that are missing."""
    available = set(onnxruntime.get_available_providers())
    providers: list[tuple[str, dict[str, str]]] = []
    missing: list[str] = []
    for accelerator in accelerators:
        provider, options = _provider(accelerator, threads, streams)
        if provider in available:
            providers.append((provider, options))
        else:
            missing.append(accelerator.name)
    return [*providers, ("CPUExecutionProvider", {})], missing


def _provider(accelerator: Accelerator, threads: int, streams: int) -> tuple[str, dict[str, str]]:
    parameters = dict(accelerator.parameters)
    if accelerator.name == "openvino":
        if arithmetic.is_missing(parameters):
            parameters[arithmetic.PROPERTY] = arithmetic.F32
        # Without ACCURACY, OpenVINO computes float32 models in bfloat16 on some CPUs. The property
        # in `parameters` has precedence.
        options = {
            "device_type": "CPU",
            "load_config": json.dumps({"CPU": OPENVINO_PROPERTIES | parameters}),
            "precision": "ACCURACY",
            "num_of_threads": str(threads),
            "num_streams": str(streams),
        }
        return OPENVINO, options
    if accelerator.name == "cuda":
        return "CUDAExecutionProvider", parameters
    if accelerator.name == "tensorrt":
        return "TensorrtExecutionProvider", tensorrt_options(parameters)
    raise InvalidModel(
        f"execution accelerator {accelerator.name!r} is unknown; use openvino, cuda or tensorrt"
    )


def tensorrt_options(parameters: dict[str, str]) -> dict[str, str]:
    """TensorRT options of onnxruntime, from the parameters of Triton's ONNX Runtime backend."""
    options = {key: value for key, value in parameters.items() if key.startswith("trt_")}
    if "max_workspace_size_bytes" in parameters:
        options["trt_max_workspace_size"] = parameters["max_workspace_size_bytes"]
    precision = parameters.get("precision_mode", "FP32")
    if precision in ("FP16", "INT8"):
        options[f"trt_{precision.lower()}_enable"] = "1"
    return options


def _check_signature(session: onnxruntime.InferenceSession) -> None:
    inputs = {node.name for node in session.get_inputs()} - {TOKEN_TYPES}
    outputs = {node.name for node in session.get_outputs()}
    if inputs not in ({"input_ids", "attention_mask"}, {PIXELS}) or POOLED not in outputs:
        raise InvalidModel(
            f"{FILE_NAME} takes {sorted(inputs)} and gives {sorted(outputs)}; it must take "
            f"input_ids and attention_mask, or {PIXELS}, and give {POOLED}. Build the model again."
        )
