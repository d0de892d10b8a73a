"""What every backend here needs of Triton: read requests, answer each, translate errors.

One bad request fails alone: reading it gives an error in its place, and the others of the
same dynamic batch are answered.
"""

from __future__ import annotations

import asyncio
import json
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from halimede_ops import errors, text, vectors
from halimede_ops.errors import HalimedeError, InvalidDimensions, InvalidModel
from halimede_ops.spec import ModelSpec

NAMED_ERROR = re.compile(r"(?:^|', )([A-Z]\w+): (.*)", re.DOTALL)
"""An error's class and message, behind the ensembles that Triton names."""
T = TypeVar("T")
R = TypeVar("R")


class ModelConfig:
    """The config.pbtxt of the model that this process serves, and where its files are."""

    def __init__(self, args: Mapping[str, str]) -> None:
        self.fields: dict[str, Any] = json.loads(args["model_config"])
        self.name = self.fields["name"]
        folder = Path(args["model_repository"])
        self.repository = folder.parent
        self.version_folder = folder / args["model_version"]

    def parameter(self, name: str, default: str = "") -> str:
        """The string value of one of the config's `parameters`."""
        return self.fields.get("parameters", {}).get(name, {}).get("string_value", default)


def load(read: Callable[[], T]) -> T:
    """What `read` gives; a model that cannot be read fails to load with one plain line."""
    try:
        return read()
    except InvalidModel as error:
        raise pb_utils.TritonModelException(str(error)) from None


def answer(
    requests: Sequence[Any],
    read: Callable[[Any], T],
    compute: Callable[[list[T]], Sequence[R | HalimedeError]],
    write: Callable[[R], list[Any]],
    failed: Callable[[HalimedeError], None],
) -> list[Any]:
    """One InferenceResponse a request: read each, compute all that read well, write each.

    `read` may raise HalimedeError for its request; `compute` gives a result or an error for
    each value it got, in order; `write` turns a result into output tensors; `failed` hears of each
    error.
    """
    read_results = [attempt(read, request) for request in requests]
    values = [value for value in read_results if not isinstance(value, HalimedeError)]
    computed = iter(_compute_all(compute, values))
    return [
        _respond(
            value if isinstance(value, HalimedeError) else next(computed),
            write,
            failed,
        )
        for value in read_results
    ]


async def answer_each(
    requests: Sequence[Any],
    read: Callable[[Any], T],
    compute: Callable[[T], Awaitable[R]],
    write: Callable[[R], list[Any]],
    failed: Callable[[HalimedeError], None],
) -> list[Any]:
    """One InferenceResponse a request, all computed at a time: `answer` for coroutines."""

    async def one(request: Any) -> Any:
        value = attempt(read, request)
        if isinstance(value, HalimedeError):
            return _respond(value, write, failed)
        try:
            return _respond(await compute(value), write, failed)
        except HalimedeError as error:
            return _respond(error, write, failed)
        except Exception as error:
            return _respond(_internal(error), write, failed)

    return list(await asyncio.gather(*[one(request) for request in requests]))


async def ask(model: str, version: int, inputs: list[Any], output: str) -> np.ndarray:
    """One output of another model of this server, in exactly this version.

    Raises:
        HalimedeError: what the model answered.
        ModelChanged: it has no such version any more.
    """
    request = pb_utils.InferenceRequest(
        model_name=model, model_version=version, requested_output_names=[output], inputs=inputs
    )
    response = await request.async_exec()
    if response.has_error():
        raise _translated(response.error().message(), model)
    return np.asarray(pb_utils.get_output_tensor_by_name(response, output).as_numpy())


def _translated(message: str, model: str) -> HalimedeError:
    """The error that another model answered with, as it was before Triton wrapped it."""
    named = NAMED_ERROR.search(message)
    kind = getattr(errors, named[1], None) if named else None
    if named and isinstance(kind, type) and issubclass(kind, HalimedeError):
        return kind(named[2])
    if "maximum queue size" in message:
        return errors.ServerOverloaded(f"the queue of {model} is full. Send again.")
    if "not found" in message or "unknown model" in message or "not ready" in message:
        return errors.ModelChanged(
            f"{model} is not served in the version that the fusion was made for. Serve it, or "
            "make the fusion again."
        )
    pb_utils.Logger.log_error(f"{model} failed within a fusion")
    return HalimedeError("internal error; the server's log names its place")


def answer_later(
    requests: Sequence[Any],
    read: Callable[[Any], T],
    start: Callable[[T, Callable[[R | Exception], None], Callable[[], bool]], None],
    write: Callable[[R], list[Any]],
    failed: Callable[[HalimedeError], None],
) -> None:
    """Read each request and start it; each is answered, from any thread, when its result comes.

    `read` may raise HalimedeError for its request; `start` gets what was read, the function to
    call once with the result or with what was raised, and one that says whether the caller has
    cancelled the request; `failed` hears of each error.
    """
    for request in requests:
        sender = request.get_response_sender()
        send = _sending(sender, write, failed)
        value = attempt(read, request)
        if isinstance(value, HalimedeError):
            send(value)
        else:
            try:
                start(value, send, sender.is_cancelled)
            except Exception as error:  # before the request was queued: nobody else answers it
                send(error)


def _sending(
    sender: Any, write: Callable[[R], list[Any]], failed: Callable[[HalimedeError], None]
) -> Callable[[R | Exception], None]:
    def send(result: R | Exception) -> None:
        if isinstance(result, Exception) and not isinstance(result, HalimedeError):
            result = _internal(result)
        try:
            sender.send(
                _respond(result, write, failed),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
            )
        except Exception as error:  # the next requests are answered all the same
            _internal(error)

    return send


def _compute_all(
    compute: Callable[[list[T]], Sequence[R | HalimedeError]], values: list[T]
) -> Sequence[R | HalimedeError]:
    if not values:
        return []
    results = attempt(compute, values)
    if isinstance(results, HalimedeError):
        return [results] * len(values)
    return results


def attempt(function: Callable[[T], R], value: T) -> R | HalimedeError:
    """What `function` gives for `value`, or the error it raised; one nobody foresaw goes to the log
    and becomes a plain one.
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
    failed: Callable[[HalimedeError], None],
) -> Any:
    outputs = result if isinstance(result, HalimedeError) else attempt(write, result)
    if not isinstance(outputs, HalimedeError):
        return pb_utils.InferenceResponse(output_tensors=outputs)
    _free(outputs)
    failed(outputs)
    code = getattr(pb_utils.TritonError, outputs.code)
    # The class goes first, so that the client raises the same one.
    message = f"{type(outputs).__name__}: {outputs}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _free(error: Exception) -> None:
    """Let go of where an error was raised: those frames hold the request, all its texts and the
    error itself, so that they would stay until Python next looks for such circles.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


def _internal(error: Exception) -> HalimedeError:
    """The error a caller sees for one nobody foresaw; its message could hold a user's text, so
    the log gets its class and place alone and the caller neither.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    pb_utils.Logger.log_error(f"{type(error).__name__} at {place}")
    return HalimedeError("internal error; the server's log names its place")


def warn(message: str) -> None:
    """Write one warning to the server's log."""
    pb_utils.Logger.log_warn(message)


class Texts(NamedTuple):
    """What one request asks to be embedded."""

    texts: list[str]
    input_types: list[str | None]


def texts(request: Any, spec: ModelSpec) -> Texts:
    """TEXT and INPUT_TYPE of a request.

    Raises:
        InvalidText: a text is not valid UTF-8, or too large.
        UnknownInputType: the model has no such prompt.
    """
    values = tensor(request, "TEXT").reshape(-1)
    found = [text.decode(value, row, spec) for row, value in enumerate(values)]
    given = optional_tensor(request, "INPUT_TYPE")
    if given is None:
        return Texts(found, [None] * len(found))
    input_types = [
        text.decode(value, row, spec) or None for row, value in enumerate(given.reshape(-1))
    ]
    for input_type in set(input_types):
        spec.prompt(input_type)  # an unknown one fails this request alone
    return Texts(found, input_types)


def dimensions(request: Any, spec: ModelSpec) -> int | None:
    """DIMENSIONS of a request; None when it leaves them out.

    Raises:
        InvalidDimensions: they differ between rows, or lie outside 1 … the model's dims.
    """
    given = optional_tensor(request, "DIMENSIONS")
    if given is None:
        return None
    values = np.unique(given)
    if len(values) > 1:
        raise InvalidDimensions(
            "DIMENSIONS differs between the rows of one request; send one request for each"
        )
    return vectors.check_dimensions(int(values[0]), spec)


def given(request: Any, *names: str) -> list[Any]:
    """The named input tensors that a request has, to hand on as they are."""
    found = (pb_utils.get_input_tensor_by_name(request, name) for name in names)
    return [one for one in found if one is not None]


def tensor(request: Any, name: str) -> np.ndarray:
    """The named input as an array of the request's own shape."""
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def optional_tensor(request: Any, name: str) -> np.ndarray | None:
    """The named input, or None when the request leaves it out."""
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


def output(name: str, array: np.ndarray) -> Any:
    """An output tensor."""
    return pb_utils.Tensor(name, array)
