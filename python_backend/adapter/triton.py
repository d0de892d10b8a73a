"""Triton's Python API for the backends: read requests, answer each, translate errors.

A bad request fails alone: the other requests of the same dynamic batch are answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from halimede_ops import errors, spans, text, vectors
from halimede_ops.errors import HalimedeError, InvalidDimensions, InvalidInput, InvalidModel
from halimede_ops.spec import DENSE, POOLED_TOKENS, RERANKER, ModelSpec

NAMED_ERROR = re.compile(r"(?:^|', )([A-Z]\w+): (.*)", re.DOTALL)
"""Error class and message in a Triton error, after the names of ensembles that Triton prepends."""
T = TypeVar("T")
R = TypeVar("R")


class ModelConfig:
    """The config.pbtxt of the model that this process serves, and the folders of its files."""

    def __init__(self, args: Mapping[str, str]) -> None:
        self.fields: dict[str, Any] = json.loads(args["model_config"])
        self.name = self.fields["name"]
        folder = Path(args["model_repository"])
        self.repository = folder.parent
        self.version_folder = folder / args["model_version"]

    def parameter(self, name: str, default: str = "") -> str:
        """The string value of one of the config's parameters, or `default`."""
        return self.fields.get("parameters", {}).get(name, {}).get("string_value", default)


def load(read: Callable[[], T]) -> T:
    """Call `read` and return its result.

    Raises:
        TritonModelException: `read` raised InvalidModel. Triton logs its one-line message.
    """
    try:
        return read()
    except InvalidModel as error:
        raise pb_utils.TritonModelException(str(error)) from None


def answer(
    requests: Sequence[Any],
    read: Callable[[Any], T],
    compute: Callable[[list[T]], Sequence[R | HalimedeError]],
    write: Callable[[R], list[Any]],
    on_error: Callable[[HalimedeError], None],
) -> list[Any]:
    """Answer requests together: one InferenceResponse for each, in order.

    Args:
        requests: Triton's requests.
        read: reads one request; may raise HalimedeError.
        compute: takes the values that were read; gives a result or an error for each, in order.
        write: makes the output tensors of a result.
        on_error: called with each error.
    """
    read_results = [attempt(read, request) for request in requests]
    values = [value for value in read_results if not isinstance(value, HalimedeError)]
    computed = iter(_compute_all(compute, values))
    return [
        _respond(
            value if isinstance(value, HalimedeError) else next(computed),
            write,
            on_error,
        )
        for value in read_results
    ]


async def answer_each(
    requests: Sequence[Any],
    read: Callable[[Any], T],
    compute: Callable[[T], Awaitable[R]],
    write: Callable[[R], list[Any]],
    on_error: Callable[[HalimedeError], None],
) -> list[Any]:
    """As `answer`, with a coroutine that computes one request; all run at the same time."""

    async def respond(request: Any) -> Any:
        value = attempt(read, request)
        if isinstance(value, HalimedeError):
            return _respond(value, write, on_error)
        try:
            return _respond(await compute(value), write, on_error)
        except HalimedeError as error:
            return _respond(error, write, on_error)
        except Exception as error:
            return _respond(_internal(error), write, on_error)

    return list(await asyncio.gather(*[respond(request) for request in requests]))


async def infer(model: str, version: int, inputs: list[Any], *outputs: str) -> list[np.ndarray]:
    """Call this version of another model on this server, and return these of its outputs.

    Raises:
        HalimedeError: the model answered with an error.
        ModelChanged: the server no longer serves this version.
    """
    request = pb_utils.InferenceRequest(
        model_name=model, model_version=version, requested_output_names=list(outputs), inputs=inputs
    )
    response = await request.async_exec()
    if response.has_error():
        raise _translate(response.error().message(), model)
    return [
        np.asarray(pb_utils.get_output_tensor_by_name(response, output).as_numpy())
        for output in outputs
    ]


def _translate(message: str, model: str) -> HalimedeError:
    """The error that another model raised, from the message that Triton made of it."""
    named = NAMED_ERROR.search(message)
    kind = getattr(errors, named[1], None) if named else None
    if named and isinstance(kind, type) and issubclass(kind, HalimedeError):
        return kind(named[2])
    if "maximum queue size" in message:
        return errors.ServerOverloaded(f"the queue of {model} is full. Send again.")
    if "not found" in message or "unknown model" in message or "not ready" in message:
        return errors.ModelChanged(
            f"{model} is not served in the version that this model was made for. Serve it, or "
            "make this model again."
        )
    pb_utils.Logger.log_error(f"{model} failed within another model")
    return HalimedeError("internal error in the server; see its log")


def answer_later(
    requests: Sequence[Any],
    read: Callable[[Any], T],
    start: Callable[[T, Callable[[R | Exception], None], Callable[[], bool]], None],
    write: Callable[[R], list[Any]],
    on_error: Callable[[HalimedeError], None],
) -> None:
    """Start requests; each is answered, from any thread, as soon as its result is there.

    Args:
        requests: Triton's requests.
        read: reads one request; may raise HalimedeError.
        start: takes what was read, a function that it calls once with the result or an exception,
            and a function that returns whether the caller has cancelled the request.
        write: makes the output tensors of a result.
        on_error: called with each error.
    """
    for request in requests:
        sender = request.get_response_sender()
        send = _sender(sender, write, on_error)
        value = attempt(read, request)
        if isinstance(value, HalimedeError):
            send(value)
        else:
            try:
                start(value, send, sender.is_cancelled)
            except Exception as error:  # the request is not queued: answer it here
                send(error)


def _sender(
    sender: Any, write: Callable[[R], list[Any]], on_error: Callable[[HalimedeError], None]
) -> Callable[[R | Exception], None]:
    def send(result: R | Exception) -> None:
        if isinstance(result, Exception) and not isinstance(result, HalimedeError):
            result = _internal(result)
        try:
            sender.send(
                _respond(result, write, on_error),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
            )
        except Exception as error:  # the following requests must still be answered
            _internal(error)

    return send


def _compute_all(
    compute: Callable[[list[T]], Sequence[R | HalimedeError]], values: list[T]
) -> Sequence[R | HalimedeError]:
    if not values:
        return []
    results = attempt(compute, values)
    if not isinstance(results, HalimedeError):
        return results
    if len(values) == 1:
        return [results]
    # One of them failed all: compute each alone, so that it fails alone.
    return [result for value in values for result in _compute_all(compute, [value])]


def attempt(function: Callable[[T], R], value: T) -> R | HalimedeError:
    """Return `function(value)`, or the error that it raised.

    An unexpected exception is logged and becomes a plain HalimedeError.
    """
    try:
        return function(value)
    except HalimedeError as error:
        return error
    except Exception as error:
        return _internal(error)


def _respond(
    result: R | HalimedeError,
    write: Callable[[R], list[Any]],
    on_error: Callable[[HalimedeError], None],
) -> Any:
    outputs = result if isinstance(result, HalimedeError) else attempt(write, result)
    if not isinstance(outputs, HalimedeError):
        return pb_utils.InferenceResponse(output_tensors=outputs)
    _drop_frames(outputs)
    reported(on_error)(outputs)
    code = getattr(pb_utils.TritonError, outputs.code)
    # The message starts with the class: the client raises the same one.
    message = f"{type(outputs).__name__}: {outputs}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _drop_frames(error: Exception) -> None:
    """Drop the stack frames of an error, which hold the request and all its texts.

    The frames also hold the error. Without this, the cycle stays in memory until Python's next
    garbage collection.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


def _internal(error: Exception) -> HalimedeError:
    """Log an unexpected exception and return the error that the caller gets instead.

    The caller gets neither its class nor its message.
    """
    report(error)
    return HalimedeError("internal error in the server; see its log")


def report(error: BaseException) -> None:
    """Log the class, file and line of an exception. Its message could hold a user's text."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no line"
    pb_utils.Logger.log_error(f"{type(error).__name__} at {line}")


def reported(function: Callable[[T], None]) -> Callable[[T], None]:
    """A function that logs what `function` raises. For counters: no request fails by its count."""

    def call(value: T) -> None:
        try:
            function(value)
        except Exception as error:
            report(error)

    return call


def end_process(error: BaseException) -> None:
    """Log what ended a thread of the scheduler, and end this process.

    Triton cannot be told that a model is no longer ready. It notices that a backend's process has
    ended; `halimede serve` and the containers then start the server again.
    """
    report(error)
    os._exit(1)


def inform(message: str) -> None:
    """Write one line to the server's log, at its level `info`."""
    pb_utils.Logger.log_info(message)


def warn(message: str) -> None:
    """Write one warning to the server's log."""
    pb_utils.Logger.log_warn(message)


class Texts(NamedTuple):
    """The texts of one request."""

    texts: list[str]
    input_types: list[str | None]
    """One for each text; None: the model's default."""
    seconds: list[str] | None = None
    """The second text of each pair; None: there are no pairs."""
    spans: np.ndarray | None = None
    """`[texts, n, 2]` int64: see `halimede_ops.spans.check`. None: no text has spans."""


def texts(request: Any, spec: ModelSpec) -> Texts:
    """Read the texts of a request: TEXT and INPUT_TYPE; of a reranker QUERY and TEXT; of a
    classifier TEXT and TEXT_PAIR; of a model built for late chunking also SPANS.

    Raises:
        InvalidInput: one of them is missing or is not `[batch, 1]`, or the texts are too large
            together, or a span is not within its text.
        InvalidText: a text is not valid UTF-8 or is too large.
        UnknownInputType: the model has no prompt for an input type.
    """
    first, second = ("QUERY", "TEXT") if spec.kind == RERANKER else ("TEXT", "TEXT_PAIR")
    values = tensor(request, first, 1).reshape(-1)
    if not spec.takes_pairs:
        decoded = text.decode_all(values, spec)
        input_types = _input_types(request, len(decoded), spec)
        asked = optional_tensor(request, "SPANS", "spans", 2) if takes_spans(spec) else None
        own = None if asked is None else spans.check(asked, decoded)
        return Texts(decoded, input_types, spans=own)
    read = tensor if spec.kind == RERANKER else optional_tensor
    given = read(request, second, 1)
    if given is None:
        return Texts(text.decode_all(values, spec), [None] * len(values))
    _check_rows(second, given, len(values))
    firsts, seconds = text.decode_pairs(values, given.reshape(-1), spec)
    return Texts(firsts, [None] * len(values), seconds)


def takes_spans(spec: ModelSpec) -> bool:
    """Whether the model was built for late chunking."""
    return POOLED_TOKENS in spec.heads


def _input_types(request: Any, rows: int, spec: ModelSpec) -> list[str | None]:
    """Read INPUT_TYPE of a request."""
    given = optional_tensor(request, "INPUT_TYPE", 1)
    if given is None:
        return [None] * rows
    _check_rows("INPUT_TYPE", given, rows)
    input_types = [
        text.decode(value, row, spec) or None for row, value in enumerate(given.reshape(-1))
    ]
    for input_type in set(input_types):
        spec.prompt(input_type)  # raise here: an unknown one fails this request alone
    return input_types


def dimensions(request: Any, spec: ModelSpec) -> int | None:
    """Read DIMENSIONS of a request; None if the request leaves it out, and for every kind of model
    but DENSE, which has no such input.

    Raises:
        InvalidInput: it is not `[batch, 1]`.
        InvalidDimensions: the values differ between rows, or are outside 1 … the model's dims.
    """
    given = optional_tensor(request, "DIMENSIONS", 1) if spec.kind == DENSE else None
    if given is None:
        return None
    values = np.unique(given)
    if len(values) > 1:
        raise InvalidDimensions(
            "DIMENSIONS differs between the rows of one request; send one request for each"
        )
    return vectors.check_dimensions(int(values[0]), spec)


def tensors(request: Any, *names: str) -> list[Any]:
    """The named input tensors that a request has, as Triton's own objects."""
    inputs = (pb_utils.get_input_tensor_by_name(request, name) for name in names)
    return [tensor for tensor in inputs if tensor is not None]


def tensor(request: Any, name: str, *dims: int | str) -> np.ndarray:
    """The named input as an array `[batch, *dims]`; see `optional_tensor`.

    Raises:
        InvalidInput: the request leaves it out, or its shape is another.
    """
    array = optional_tensor(request, name, *dims)
    if array is None:
        raise InvalidInput(f"the input {name} is missing; send it as {_shape(dims)}.")
    return array


def optional_tensor(request: Any, name: str, *dims: int | str) -> np.ndarray | None:
    """The named input as an array `[batch, *dims]`, or None if the request leaves it out.

    A dimension is its length, or a name that stands for any length from 1 on. Triton checks shapes
    too, but counts rows in 32 bits: of `[2**32, 1]` the batch is 0 and the array has no rows.

    Raises:
        InvalidInput: its shape is another.
    """
    given = pb_utils.get_input_tensor_by_name(request, name)
    if given is None:
        return None
    array: np.ndarray = given.as_numpy()
    is_right = array.ndim == 1 + len(dims) and array.size > 0
    if not is_right or any(
        isinstance(length, int) and length != actual
        for length, actual in zip(dims, array.shape[1:], strict=True)
    ):
        raise InvalidInput(
            f"the input {name} has the shape {list(array.shape)}; it must be {_shape(dims)}, with "
            "at least one row."
        )
    return array


def _check_rows(name: str, array: np.ndarray, rows: int) -> None:
    if len(array) != rows:
        raise InvalidInput(
            f"the input {name} has {len(array)} rows for {rows} texts; send one row for each."
        )


def _shape(dims: Sequence[int | str]) -> str:
    return f"[{', '.join(['batch', *map(str, dims)])}]"


def output(name: str, array: np.ndarray) -> Any:
    """The array as an output tensor."""
    return pb_utils.Tensor(name, array)
