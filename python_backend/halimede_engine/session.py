"""One ONNX model and how to run rows through it: texts' tokens of any lengths, or pictures."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from halimede_engine import batching, memory
from halimede_ops.errors import InvalidModel
from halimede_ops.spec import PIXELS, POOLED

FILE_NAME = "model.onnx"

LONE_RUNS = 8
"""Runs on end after which Sessions opens the session that gives each all threads: that takes time
and memory, as much as the first one."""

FIRST_RUNS = 2
"""Runs of a shape that no other new shape's run in the process may overlap. OpenVINO 2025.4 gave
wrong vectors in about 1 of 70 processes whose streams both began with one shape at one moment, from
then on: one stream for all runs of that shape, as if what it had prepared for it were broken."""
_PREPARING = threading.Lock()
"""Held by the first runs of a shape: some of what they prepare, such as oneDNN's compiled kernels,
is the process's and not a session's."""

PADDED_NEAR = ("fp32", "fp16")
"""Precisions that answer a lone text sooner with `pad_near`: on a CPU their tokens cost more than a
change of shape."""

Tell = Callable[[int], None]
"""What hears of a run's tokens, padding among them."""

PACKED = "packed"
"""Key of a model.onnx's metadata: its rows may have several texts, numbered by the mask."""

OPENVINO = "OpenVINOExecutionProvider"
OPENVINO_PROPERTIES = {
    # OpenVINO pins the threads of every process to the same first cores: two instances of one
    # model would share one core and leave the other idle.
    "ENABLE_CPU_PINNING": "NO",
}


def data_of(path: Path) -> Path:
    """Where a built model.onnx has its weights: a file that engines map where they would copy what
    a protobuf holds, so the model opens sooner and needs less memory.
    """
    return path.with_name(path.name + ".data")


def files(path: Path) -> list[Path]:
    """The file of a model.onnx's weights, where it has them beside it, then the model.onnx."""
    data = data_of(path)
    return [data, path] if data.exists() else [path]


def file_bytes(path: Path) -> int:
    """Size of a model.onnx with its weights."""
    return sum(part.stat().st_size for part in files(path))


class Accelerator(NamedTuple):
    """An execution accelerator by its name in config.pbtxt, with its parameters: OpenVINO's are
    properties of its CPU device.
    """

    name: str
    parameters: Mapping[str, str] = {}


class Row(NamedTuple):
    """One tokenized text as it comes from a request."""

    ids: np.ndarray
    """Token ids `[tokens]` int64."""
    mask: np.ndarray
    """Attention mask `[tokens]` int64: 1 for a token, 0 for padding."""
    total: int = 0
    """Tokens of the whole text, where it is known: more than those of the row were cut off."""

    @property
    def length(self) -> int:
        """Tokens, padding included."""
        return len(self.ids)


class Place(NamedTuple):
    """Where a text lies in a model's inputs."""

    row: int
    start: int
    """Its first token in the row."""
    number: int
    """Texts before it in the row."""


class Layout(NamedTuple):
    """How texts lie in a model's inputs."""

    places: list[Place]
    """Of each text."""
    shape: tuple[int, int]
    """Rows, and tokens of each."""


class Inputs(NamedTuple):
    """A model's inputs for one run."""

    places: list[Place]
    """Of each text or picture."""
    feeds: dict[str, np.ndarray]
    """By name."""
    tokens: int
    """That the run costs, padding among them; pictures are not padded."""


class Pixels(NamedTuple):
    """One picture as it comes from a request."""

    values: np.ndarray
    """`[3, height, width]` uint8."""
    length: int
    """Positions that the model gives it: what it costs, in tokens of a text."""


def rows(texts: Iterable[tuple[Sequence[int], int]]) -> list[Row]:
    """The rows of texts' token ids, none of them padding, each given with its text's total."""
    arrays = [(np.array(ids, np.int64), total) for ids, total in texts]
    return [Row(ids, np.ones_like(ids), total) for ids, total in arrays]


def pixel_rows(pictures: Iterable[np.ndarray], positions: int) -> list[Pixels]:
    """The rows of pictures' pixels, for a model that gives each so many positions."""
    return [Pixels(values, positions) for values in pictures]


class Session:
    """An opened model.onnx. Safe to call from several threads."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        streams: int,
        max_tokens: int | None,
        micro_batch_tokens: int,
        pad_near: bool,
        tell: Tell,
    ) -> None:
        self._session = session
        self._tell = tell
        self._max_tokens = max_tokens
        self._micro_batch_tokens = micro_batch_tokens
        self._padded_length = batching.near_length if pad_near else batching.padded_length
        """Of a row that runs alone."""
        self._packed = PACKED in session.get_modelmeta().custom_metadata_map
        self.heads = [node.name for node in session.get_outputs() if node.name != POOLED]
        """Names of the outputs with one row a token."""
        self._streams = streams
        self._threads = ThreadPoolExecutor(streams) if streams > 1 else None
        self._runs: Counter[tuple[int, ...]] = Counter()
        """Of each shape, up to FIRST_RUNS."""

    def plan(self, lengths: Sequence[int], streams: int) -> list[list[int]]:
        """Indices of rows of these lengths in the micro-batches that cost least in `streams`."""
        plan = batching.plan_packed if self._packed else batching.plan
        return plan(lengths, streams, self._micro_batch_tokens)

    def run(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Pooled vectors `[len(rows), dims]` float32, in the order of `rows`.

        Rows run in micro-batches of like length, or several in one row of the model, so a row's
        vector does not depend on what is asked beside it beyond the last bits of float32.
        """
        parts = self.plan([row.length for row in rows], self._streams)
        run = map if self._threads is None else self._threads.map
        results = list(run(lambda part: self.run_together([rows[i] for i in part]), parts))
        out = np.empty((len(rows), results[0].shape[1]), np.float32)
        for part, vectors in zip(parts, results, strict=True):
            out[part] = vectors
        return out

    def run_together(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Pooled vectors `[len(rows), dims]` float32 of one run."""
        inputs = self._inputs(rows)
        [pooled] = self._outputs([POOLED], inputs)
        return np.asarray(_of_texts(pooled, inputs.places))

    def run_with_heads(self, rows: Sequence[Row | Pixels]) -> list[dict[str, np.ndarray]]:
        """Every output of one run, by row: POOLED `[dims]` float32, and each of `heads`
        `[tokens of the row, width]` float32.
        """
        inputs = self._inputs(rows)
        places = inputs.places
        pooled, *heads = self._outputs([POOLED, *self.heads], inputs)
        named = list(zip(self.heads, heads, strict=True))
        return [
            {POOLED: vector}
            | {name: values[place.row, place.start :][: row.length] for name, values in named}
            for row, place, vector in zip(rows, places, _of_texts(pooled, places), strict=True)
        ]

    def _outputs(self, names: list[str], inputs: Inputs) -> list[np.ndarray]:
        self._tell(inputs.tokens)
        shape = next(iter(inputs.feeds.values())).shape
        if self._runs[shape] >= FIRST_RUNS:
            return list(self._session.run(names, inputs.feeds))
        with _PREPARING:
            outputs = list(self._session.run(names, inputs.feeds))
            self._runs[shape] += 1
        return outputs

    def _inputs(self, rows: Sequence[Row | Pixels]) -> Inputs:
        """The inputs of rows that run together."""
        pictures = [row.values for row in rows if isinstance(row, Pixels)]
        if pictures:
            tokens = sum(row.length for row in rows)
            return Inputs(_apart(len(rows)), {PIXELS: np.stack(pictures)}, tokens)
        texts = [row for row in rows if isinstance(row, Row)]
        places, shape = self._layout(texts)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for text, place in zip(texts, places, strict=True):
            end = place.start + text.length
            ids[place.row, place.start : end] = text.ids
            mask[place.row, place.start : end] = text.mask * (place.number + 1)
        return Inputs(places, {"input_ids": ids, "attention_mask": mask}, math.prod(shape))

    def _layout(self, texts: Sequence[Row]) -> Layout:
        if self._packed:
            # What is masked as a whole has no number, so nothing may lie beside it.
            places = _side_by_side([text.length if text.mask.any() else 0 for text in texts])
        else:
            places = _apart(len(texts))
        longest = max(place.start + text.length for text, place in zip(texts, places, strict=True))
        rows = max(place.row for place in places) + 1
        if self._packed and rows > 1:
            return Layout(places, (rows, batching.packed_length(longest)))
        # A text's positions begin anew where it begins, so a packed row may have more of them.
        most = None if self._packed else self._max_tokens
        padded_length = batching.padded_length if rows > 1 else self._padded_length
        return Layout(places, (rows, padded_length(longest, most)))


class Sessions:
    """A model's sessions: one whose streams share the threads, and for a program that runs little
    at a time, once LONE_RUNS runs on end were alone, one that gives each run all of them. Safe to
    call from several threads.
    """

    def __init__(self, shared: Session, open_alone: Callable[[], Session]) -> None:
        self._shared = shared
        self._open_alone = open_alone
        self._alone: Session | None = None
        self._lock = threading.Lock()
        """Guards what follows."""
        self._lone = 0
        """Runs on end that were alone."""

    def run_together(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Pooled vectors `[len(rows), dims]` float32 of one run, which others may be beside."""
        with self._lock:
            self._lone = 0
        return self._shared.run_together(rows)

    def run_alone(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """As `run_together`, of a run that most likely has no other beside it."""
        with self._lock:
            self._lone += 1
            if self._lone == LONE_RUNS and self._alone is None:
                self._alone = self._open_alone()
            chosen = self._alone or self._shared
        return chosen.run_together(rows)


def _apart(count: int) -> list[Place]:
    return [Place(row, 0, 0) for row in range(count)]


def _side_by_side(lengths: Sequence[int]) -> list[Place]:
    """The place of each text; texts of one row follow each other without a gap."""
    places = _apart(len(lengths))
    for row, texts in enumerate(batching.pack(lengths)):
        start = 0
        for number, text in enumerate(texts):
            places[text] = Place(row, start, number)
            start += lengths[text]
    return places


def _of_texts(pooled: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """Each text's vector of those that a run gave: as many of each row, for at least its texts."""
    rows = max(place.row for place in places) + 1
    each = len(pooled) // rows
    return pooled[[place.row * each + place.number for place in places]]


def joined(rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Outputs by name of rows that ran in any micro-batches: POOLED `[len(rows), dims]` float32,
    and each head `[len(rows), tokens of the longest, width]`, zeros behind the others.

    Each row is what `run_together` or `run_with_heads` gave for it.
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
    pad_near: bool = False,
    tell: Tell = lambda tokens: None,
) -> tuple[Session, list[str]]:
    """The session of a model.onnx, and the names of accelerators this onnxruntime lacks.

    `threads` CPU threads are shared by `streams` micro-batches that run at the same time: more
    streams give more texts a second, fewer give one text sooner. Rows are never padded beyond
    `max_tokens`, for which the model has positions; a run has at most `micro_batch_tokens`, or one
    row. `pad_near` pads a run of one row to `batching.near_length` instead of `padded_length`.
    `tell` hears of the tokens of each run, padding among them. A missing accelerator falls back to
    the CPU execution provider; the caller decides how to say so.

    Raises:
        InvalidModel: the file is missing or onnxruntime cannot read it, or an accelerator's
            name is unknown.
    """
    providers, missing = execution_providers(accelerators, threads, streams)
    options = session_options(providers)
    options.intra_op_num_threads = max(1, threads // streams)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        raise InvalidModel(
            f"{FILE_NAME} cannot be opened ({type(error).__name__}); build the model again"
        ) from error
    # onnxruntime drops a provider that it cannot start and goes on with the next.
    lost = [name for name, _ in providers if name not in session.get_providers()]
    if lost:
        raise InvalidModel(f"{FILE_NAME} cannot be run by {', '.join(lost)}; see the server's log")
    _check_signature(session)
    # Compiling the model needed 70 MB more for the default model in INT8 with OpenVINO.
    memory.trim()
    return Session(session, streams, max_tokens, micro_batch_tokens, pad_near, tell), missing


def session_options(
    providers: Sequence[tuple[str, Mapping[str, str]]],
) -> onnxruntime.SessionOptions:
    """How onnxruntime opens a model for these execution providers, on any number of threads."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin between operators starve the other instance on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if providers[0][0] == OPENVINO:
        # It optimises what it takes, as a rule the whole graph, itself.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def execution_providers(
    accelerators: Sequence[Accelerator], threads: int, streams: int
) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """The execution providers for a config.pbtxt's accelerators, and the missing names."""
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
        # ACCURACY keeps float32 float32 on CPUs where OpenVINO would choose bfloat16.
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
    """TensorRT options of onnxruntime from the keys that Triton's ONNX Runtime backend takes."""
    options = {key: value for key, value in parameters.items() if key.startswith("trt_")}
    if "max_workspace_size_bytes" in parameters:
        options["trt_max_workspace_size"] = parameters["max_workspace_size_bytes"]
    precision = parameters.get("precision_mode", "FP32")
    if precision in ("FP16", "INT8"):
        options[f"trt_{precision.lower()}_enable"] = "1"
    return options


def _check_signature(session: onnxruntime.InferenceSession) -> None:
    inputs = {node.name for node in session.get_inputs()}
    outputs = {node.name for node in session.get_outputs()}
    if inputs not in ({"input_ids", "attention_mask"}, {PIXELS}) or POOLED not in outputs:
        raise InvalidModel(
            f"{FILE_NAME} takes {sorted(inputs)} and gives {sorted(outputs)}; it must take "
            f"input_ids and attention_mask, or {PIXELS}, and give {POOLED}. Build the model again."
        )
