"""One ONNX model and how to run rows through it: texts' tokens of any lengths, or pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from halimede_ops import batch, memory
from halimede_ops.errors import InvalidModel
from halimede_ops.spec import PIXELS, POOLED

FILE_NAME = "model.onnx"
DATA_SUFFIX = ".data"
"""Weights of a model.onnx too large for one protobuf file lie in `model.onnx.data`."""

OPENVINO_PROPERTIES = {
    # OpenVINO pins the threads of every process to the same first cores: two instances of one
    # model would share one core and leave the other idle.
    "ENABLE_CPU_PINNING": "NO",
}


def files(path: Path) -> list[Path]:
    """A model.onnx and, where its weights lie beside it, their file."""
    data = path.with_name(path.name + DATA_SUFFIX)
    return [path, data] if data.exists() else [path]


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

    @property
    def length(self) -> int:
        """Tokens, padding included."""
        return len(self.ids)


class Pixels(NamedTuple):
    """One picture as it comes from a request."""

    values: np.ndarray
    """`[3, height, width]` uint8."""
    length: int
    """Positions that the model gives it: what it costs, in tokens of a text."""


def rows(texts: Iterable[Sequence[int]]) -> list[Row]:
    """The rows of texts' token ids, none of them padding."""
    arrays = [np.array(ids, np.int64) for ids in texts]
    return [Row(ids, np.ones_like(ids)) for ids in arrays]


def pixel_rows(pictures: Iterable[np.ndarray], positions: int) -> list[Pixels]:
    """The rows of pictures' pixels, for a model that gives each so many positions."""
    return [Pixels(values, positions) for values in pictures]


class Session:
    """An opened model.onnx. Safe to call from several threads."""

    def __init__(
        self, session: onnxruntime.InferenceSession, streams: int, max_tokens: int | None
    ) -> None:
        self._session = session
        self._max_tokens = max_tokens
        self.heads = [node.name for node in session.get_outputs() if node.name != POOLED]
        """Names of the outputs with one row a token."""
        self._streams = ThreadPoolExecutor(streams) if streams > 1 else None

    def run(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Pooled vectors `[len(rows), dims]` float32, in the order of `rows`.

        Rows are sorted by length and run in micro-batches, so a row's vector does not depend on
        what is asked beside it beyond the last bits of float32.
        """
        parts = batch.plan([row.length for row in rows])
        run = map if self._streams is None else self._streams.map
        results = list(run(lambda part: self.run_together([rows[i] for i in part]), parts))
        out = np.empty((len(rows), results[0].shape[1]), np.float32)
        for part, vectors in zip(parts, results, strict=True):
            out[part] = vectors
        return out

    def run_together(self, rows: Sequence[Row | Pixels]) -> np.ndarray:
        """Pooled vectors `[len(rows), dims]` float32 of one run, all rows padded alike."""
        return np.asarray(self._session.run([POOLED], self.feeds(rows))[0])

    def run_with_heads(self, rows: Sequence[Row | Pixels]) -> list[dict[str, np.ndarray]]:
        """Every output of one run, by row: POOLED `[dims]` float32, and each of `heads`
        `[tokens of the row, width]` float32.
        """
        names = [POOLED, *self.heads]
        outputs = self._session.run(names, self.feeds(rows))
        return [
            {
                name: values[index] if name == POOLED else values[index, : row.length]
                for name, values in zip(names, outputs, strict=True)
            }
            for index, row in enumerate(rows)
        ]

    def feeds(self, rows: Sequence[Row | Pixels]) -> dict[str, np.ndarray]:
        """The model's inputs for rows that run together, texts padded alike."""
        pictures = [row.values for row in rows if isinstance(row, Pixels)]
        if pictures:
            return {PIXELS: np.stack(pictures)}
        texts = [row for row in rows if isinstance(row, Row)]
        length = batch.padded_length(max(row.length for row in texts), self._max_tokens)
        return {
            "input_ids": batch.pad([row.ids for row in texts], length),
            "attention_mask": batch.pad([row.mask for row in texts], length),
        }


def joined(rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Outputs by name of rows that ran in any micro-batches: POOLED `[len(rows), dims]` float32,
    and each head `[len(rows), tokens of the longest, width]`, zeros behind the others.

    Each row is what `run_together` or `run_with_heads` gave for it.
    """
    if not isinstance(rows[0], dict):
        return {POOLED: np.stack(rows)}
    return {
        name: np.stack(values) if name == POOLED else batch.pad_heads(values)
        for name, values in ((name, [row[name] for row in rows]) for name in rows[0])
    }


def open_session(
    path: Path,
    accelerators: Sequence[Accelerator] = (),
    threads: int = 1,
    streams: int = 1,
    max_tokens: int | None = None,
) -> tuple[Session, list[str]]:
    """The session of a model.onnx, and the names of accelerators this onnxruntime lacks.

    `threads` CPU threads are shared by `streams` micro-batches that run at the same time: more
    streams give more texts a second, fewer give one text sooner. Rows are never padded beyond
    `max_tokens`, for which the model has positions. A missing accelerator falls back to the CPU
    execution provider; the caller decides how to say so.

    Raises:
        InvalidModel: the file is missing or onnxruntime cannot read it, or an accelerator's
            name is unknown.
    """
    providers, missing = execution_providers(accelerators, threads, streams)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = max(1, threads // streams)
    # Threads that spin between operators starve the other instance on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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
    memory.give_back()
    return Session(session, streams, max_tokens), missing


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
        return "OpenVINOExecutionProvider", options
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
