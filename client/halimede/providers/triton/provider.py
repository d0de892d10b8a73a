"""Triton as a provider: one model on one server, over gRPC or HTTP.

Every answer is tied to the space that produced it. If the config pins a version
(`version_policy { specific { versions: [n] } }`, n unique to the content), the answer's own version
proves it. Otherwise the answer is not proven, and the model is described again after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from pydantic import Field, ValidationInfo, field_validator
from tritonclient.grpc import service_pb2 as messages

from halimede.inputs.content import (
    TEXT_KINDS,
    Content,
    InputKind,
    OutputKind,
    SpannedText,
    size_bytes,
)
from halimede.observability import tracing
from halimede.pipeline import canary
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import Mapped
from halimede.pipeline.waiting import Future
from halimede.providers import input_kinds
from halimede.providers.answers import (
    multi_rows,
    padded_spans,
    span_rows,
    sparse_rows,
    unknown_tokens,
)
from halimede.providers.base import DEFAULT_TIMEOUT_S, Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.providers.triton import connection, served_model
from halimede.providers.triton.connection import Tls
from halimede.results import IMAGE, ServedModel
from halimede_engine import batching
from halimede_ops import errors
from halimede_repository import configs

BULK_PRIORITY = 2
"""Priority of bulk requests. Triton's default priority overtakes it in the queue."""
VECTOR_OUTPUTS: dict[InputKind, tuple[str, ...]] = {
    "text": ("EMBEDDING", "TOKENS"),
    "image": ("EMBEDDING", "WIDTH", "HEIGHT", "FORMAT"),
    "pair": ("EMBEDDING",),
}
"""Outputs of an ensemble that are asked for vectors of a kind of inputs."""
TEXT_OUTPUTS: dict[OutputKind, tuple[str, ...]] = {
    "sparse": ("SPARSE_IDS", "SPARSE_WEIGHTS", "TOKENS"),
    "multi": ("MULTI_VECTORS", "TOKENS"),
    "spans": ("SPAN_EMBEDDINGS", "SPAN_WEIGHTS", "TOKENS"),
}
"""Outputs of an ensemble that are asked for further outputs of texts."""
Outputs = dict[str, tuple[list[int], bytes]]
"""Shape and bytes of each tensor of an answer, by name."""
FLOAT, INTEGER = np.dtype("<f4"), np.dtype("<i4")


class Options(BaseOptions):
    """A model served by Triton."""

    provider: str = "triton"
    tls: Tls = Field(default_factory=Tls)
    """Certificates, for `grpcs://` and `https://`."""
    url: tuple[str, ...] = Field(("127.0.0.1:8001",), validate_default=True)
    """Servers: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP, with a path
    where a gateway has one. With TLS: `grpcs://` and `https://`."""
    follow_canary: bool = True
    """Let a candidate that is served beside the model answer its share of the requests."""

    @property
    def refresh_s(self) -> float:
        """Age in seconds at which a model is described again, beside the calls."""
        return canary.REFRESH_S if self.follow_canary else math.inf

    @field_validator("url", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty; give at least one address")
        for url in value:
            connection.parse(url, info.data.get("tls"))  # None if tls itself is invalid
        return value


def connect(options: Options) -> list[Triton]:
    """Return a provider for each of the options' servers."""
    return [
        Triton(options.model_id, url, options.tls, options.follow_canary) for url in options.url
    ]


def served_models(options: Options) -> list[ServedModel]:
    """List the models that are ready on the options' first server that answers.

    Raises:
        HalimedeError: none answers. It is the last server's error.
    """
    *others, last = connect(options)
    for server in others:
        try:
            return server.models(options.timeout_s)
        except errors.ServerUnreachable:
            continue
    return last.models(options.timeout_s)


class Triton:
    """One model on one Triton server."""

    def __init__(
        self, model: str, url: str, tls: Tls | None = None, follow_canary: bool = True
    ) -> None:
        self.name = f"triton:{model}"
        self._model = model
        self._follow_canary = follow_canary
        self._connection = connection.connect(url, tls or Tls())
        self._pool = Pool(2, "describe")

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        self._pool.close()
        self._connection.close()

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Start to read the model's config, and that of its candidate.

        Raises:
            ModelNotFound: the server has no such model, or it is not one of halimede's ensembles.
            UnsupportedInput: neither it nor its image model embeds this kind.
        """
        return self._pool.submit(self._describe, timeout_s, kind)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Start to embed a request."""
        model = request.model or self._describe(timeout_s, request.kind)
        answer = self._connection.start(
            "ModelInfer",
            _infer_request(model, request),
            timeout_s,
            headers=tracing.headers(),
            may_block=request.may_block,
        )
        return Mapped(answer, lambda done: self._answer(done.result(), request, model))

    def models(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ServedModel]:
        """List the models that are ready, by name."""
        index = self._ask("RepositoryIndex", messages.RepositoryIndexRequest(), timeout_s)
        names = sorted(entry.name for entry in index.models if entry.state == "READY")
        models = [self._served(name, timeout_s) for name in names]
        return [model for model in models if model is not None]

    def _describe(self, timeout_s: float, kind: InputKind | None) -> ServedModel:
        configured = self._ensemble(self._model, timeout_s)
        model = configured
        if kind == "image" and configured.input == "text" and configured.image_model:
            model = self._ensemble(configured.image_model, timeout_s)
        if not input_kinds.is_of(kind, model.input):
            assert kind is not None
            raise input_kinds.unsupported(kind, self.name, configured.input, configured.kind)
        if self._follow_canary and model.version and not model.name.endswith(configs.CANDIDATE):
            with contextlib.suppress(errors.HalimedeError):  # the next read may succeed
                candidate = self._candidate(model.name + configs.CANDIDATE, timeout_s)
                model = dataclasses.replace(model, candidate=candidate)
        return model

    def _candidate(self, name: str, timeout_s: float) -> ServedModel | None:
        ready = self._ask("ModelReady", messages.ModelReadyRequest(name=name), timeout_s)
        return self._served(name, timeout_s) if ready.ready else None

    def _ensemble(self, name: str, timeout_s: float) -> ServedModel:
        model = self._served(name, timeout_s)
        if model is None:
            raise errors.ModelNotFound(f"{name!r} is a step of a model; ask for the model itself.")
        return model

    def _served(self, name: str, timeout_s: float) -> ServedModel | None:
        answer = self._ask("ModelConfig", messages.ModelConfigRequest(name=name), timeout_s)
        return served_model.from_config(answer.config)

    def _ask(self, method: str, message: Any, timeout_s: float) -> Any:
        return self._connection.start(method, message, timeout_s, may_block=True).result()

    def _answer(self, response: Any, request: Request, model: ServedModel) -> Answer:
        """Return the answer in a response.

        Raises:
            ModelChanged: another model gave it.
        """
        if model.version and response.model_version != model.version:
            raise errors.ModelChanged(
                f"{model.name} at {self._connection.address} changed during the request. Send "
                "again."
            )
        count = len(request.inputs)
        try:
            outputs = {
                one.name: (list(one.shape), raw)
                for one, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            }
            vectors = _vectors(outputs, request)
            if "TOKENS" in outputs:
                tokens = _array(outputs["TOKENS"], INTEGER).reshape(count)
            else:
                tokens = unknown_tokens(count)
            images = _images(outputs, count) if request.kind == "image" else None
        except (KeyError, IndexError, ValueError):
            raise errors.ServerError(f"{model.name} gave an incomplete answer.") from None
        return Answer(vectors, tokens, model, images, None, bool(model.version))


def _infer_request(model: ServedModel, request: Request) -> Any:
    """Return the request as a `ModelInferRequest`."""
    rows = len(request.inputs)
    message = messages.ModelInferRequest(model_name=model.name)
    names = _input_names(request.kind, model)
    if request.output == "spans":
        texts = cast("Sequence[SpannedText]", request.inputs)
        _add_bytes(message, names[0], [text.text for text in texts])
        spans = padded_spans(texts)
        message.inputs.add(name="SPANS", datatype="INT32", shape=spans.shape)
        message.raw_input_contents.append(spans.astype("<i4").tobytes())
    elif len(names) == 1:
        _add_bytes(message, names[0], request.inputs)
    else:
        for name, values in zip(names, zip(*request.inputs, strict=True), strict=True):
            if None not in values:  # a tensor that no pair has is left out
                _add_bytes(message, name, values)
    if request.input_type is not None:
        _add_bytes(message, "INPUT_TYPE", [request.input_type.encode()] * rows)
    if request.dimensions is not None:
        message.inputs.add(name="DIMENSIONS", datatype="INT32", shape=[rows, 1])
        message.raw_input_contents.append(np.full(rows, request.dimensions, "<i4").tobytes())
    for name in _output_names(request.kind, request.output, model):
        message.outputs.add(name=name)
    # `len` gives the size of a text faster than `size_bytes`.
    size = len if request.kind == "text" and request.output != "spans" else size_bytes
    total_bytes = sum(map(size, request.inputs)) if request.kind in TEXT_KINDS else 0
    if batching.is_bulk(rows, total_bytes):
        message.parameters["priority"].uint64_param = BULK_PRIORITY
    return message


def _input_names(kind: InputKind, model: ServedModel) -> tuple[str, ...]:
    """Names of the tensors of an input: of a pair, one for each part."""
    if kind == "pair":
        return ("TEXT", "IMAGE")
    if kind == "text_pair":
        return ("QUERY", "TEXT") if model.kind == "reranker" else ("TEXT", "TEXT_PAIR")
    return (kind.upper(),)


def _output_names(kind: InputKind, output: OutputKind, model: ServedModel) -> tuple[str, ...]:
    """Names of the tensors to ask for."""
    if output == "vector":
        return VECTOR_OUTPUTS[kind]
    if output == "scores":
        return ("SCORE" if model.kind == "reranker" else "SCORES", "TOKENS")
    return TEXT_OUTPUTS[output]


def _vectors(outputs: Outputs, request: Request) -> np.ndarray:
    """The vectors of an `Answer`, from the tensors of an answer."""
    if request.output == "sparse":
        ids = _array(outputs["SPARSE_IDS"], INTEGER)
        return sparse_rows(ids, _array(outputs["SPARSE_WEIGHTS"], FLOAT))
    if request.output == "multi":
        return multi_rows(_array(outputs["MULTI_VECTORS"], FLOAT))
    if request.output == "spans":
        embeddings, weights = outputs["SPAN_EMBEDDINGS"], outputs["SPAN_WEIGHTS"]
        texts = cast("Sequence[SpannedText]", request.inputs)
        return span_rows(_array(embeddings, FLOAT), _array(weights, FLOAT), texts)
    [name] = outputs.keys() & {"EMBEDDING", "SCORE", "SCORES"}
    return _array(outputs[name], FLOAT)


def _add_bytes(message: Any, name: str, values: Sequence[Content | None]) -> None:
    message.inputs.add(name=name, datatype="BYTES", shape=[len(values), 1])
    message.raw_input_contents.append(
        b"".join([len(value).to_bytes(4, "little") + value for value in values])  # type: ignore
    )


def _array(tensor: tuple[list[int], bytes], dtype: np.dtype) -> np.ndarray:
    """A tensor of an answer, given its shape and its bytes."""
    shape, raw = tensor
    # A copy: an array over the response's buffer keeps all of it in memory, and is read-only.
    return np.frombuffer(bytearray(raw), dtype).reshape(shape)


def _split(raw: bytes) -> Iterable[bytes]:
    """The elements of a BYTES tensor, each behind its length."""
    start = 0
    while start < len(raw):
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        yield raw[start + 4 : end]
        start = end


def _images(outputs: Outputs, count: int) -> np.ndarray:
    """Size and format of each image, as `[rows]` of `results.IMAGE`."""
    images = np.zeros(count, IMAGE)
    images["width"] = _array(outputs["WIDTH"], INTEGER).reshape(count)
    images["height"] = _array(outputs["HEIGHT"], INTEGER).reshape(count)
    images["format"] = list(_split(outputs["FORMAT"][1]))
    return images
