"""Triton as a provider of embeddings, through tritonclient over gRPC or HTTP."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import numpy as np
from tritonclient.utils import InferenceServerException

from halimede.results import ServedModel
from halimede_ops import errors

Wait = Callable[[], "Answer"]
"""Blocks until a sent request is answered."""

CODES = {
    "INVALID_ARGUMENT": errors.InvalidInput,
    "400": errors.InvalidInput,
    "NOT_FOUND": errors.ModelNotFound,
    "404": errors.ModelNotFound,
    "UNAVAILABLE": errors.ServerUnreachable,
    "503": errors.ServerUnreachable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "499": errors.DeadlineExceeded,
}
"""Error class of a gRPC status name or an HTTP status code."""


class Answer(NamedTuple):
    """One request's answer."""

    vectors: np.ndarray
    """`[texts, dims]` float32."""
    tokens: np.ndarray
    """`[texts]` int32."""


class Triton:
    """One Triton server. Safe to use from several threads."""

    def __init__(self, url: str, timeout_s: float) -> None:
        scheme, self.address = _parse(url)
        self.is_grpc = scheme == "grpc"
        self.timeout_s = timeout_s
        self._api: Any = importlib.import_module(f"tritonclient.{scheme}")
        self._clients = _GrpcClient(self) if self.is_grpc else _HttpClients(self)

    def close(self) -> None:
        """Close every connection; a second call does nothing."""
        self._clients.close()

    def describe(self, model: str) -> ServedModel:
        """The model as its config tells.

        Raises:
            ModelNotFound: the server has no such model, or it is none of halimede's ensembles.
        """
        config = self._call("get_model_config", model)
        parameters = {
            key: value["string_value"] for key, value in config.get("parameters", {}).items()
        }
        if "space" not in parameters:
            raise errors.ModelNotFound(f"{model!r} is a step of a model; ask for the model itself.")
        return ServedModel(
            name=model,
            space=parameters["space"],
            precision=parameters["precision"],
            dims=int(parameters["dims"]),
            max_tokens=int(parameters["max_tokens"]),
            max_batch_size=int(config["max_batch_size"]),
        )

    def models(self) -> list[ServedModel]:
        """Every embedding model that is ready, by name."""
        index = self._call("get_model_repository_index")
        names = sorted(entry["name"] for entry in index if entry.get("state") == "READY")
        described = []
        for name in names:
            try:
                described.append(self.describe(name))
            except errors.ModelNotFound:  # a composing step
                continue
        return described

    def is_ready(self) -> bool:
        """Whether the server says that it and all its models are ready."""
        options = {"client_timeout": self.timeout_s} if self.is_grpc else {}
        with self._translated():
            return bool(self._clients.get().is_server_ready(**options))

    def send(
        self, model: str, texts: Sequence[bytes], input_type: str | None, dimensions: int | None
    ) -> Wait:
        """Send one request of at most `max_batch_size` texts; call the result to wait for it."""
        rows = len(texts)
        inputs = [self._input("TEXT", "BYTES", np.array(texts, np.object_).reshape(rows, 1))]
        if input_type is not None:
            value = np.full((rows, 1), input_type.encode(), np.object_)
            inputs.append(self._input("INPUT_TYPE", "BYTES", value))
        if dimensions is not None:
            value = np.full((rows, 1), dimensions, np.int32)
            inputs.append(self._input("DIMENSIONS", "INT32", value))
        outputs = [self._api.InferRequestedOutput(name) for name in ("EMBEDDING", "TOKENS")]
        with self._translated():
            pending = self._clients.send(model, inputs, outputs)

        def wait() -> Answer:
            with self._translated():
                result = pending()
            # A copy: an array over the response's own buffer would keep all of it alive.
            return Answer(
                np.array(result.as_numpy("EMBEDDING")),
                np.array(result.as_numpy("TOKENS")).reshape(-1),
            )

        return wait

    def _call(self, method: str, *arguments: str) -> Any:
        """A JSON answer of the server's control API, alike for both protocols."""
        options: dict[str, Any] = (
            {"as_json": True, "client_timeout": self.timeout_s} if self.is_grpc else {}
        )
        with self._translated():
            answer = getattr(self._clients.get(), method)(*arguments, **options)
        if method == "get_model_repository_index" and self.is_grpc:
            return answer.get("models", [])
        return answer.get("config", answer)

    def _input(self, name: str, datatype: str, value: np.ndarray) -> Any:
        tensor = self._api.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        return tensor

    def _translated(self) -> _Translated:
        return _Translated(self.address, self.timeout_s)


class _GrpcClient:
    """One channel, shared by all threads."""

    def __init__(self, triton: Triton) -> None:
        self._timeout_s = triton.timeout_s
        self._client = triton._api.InferenceServerClient(triton.address)

    def get(self) -> Any:
        return self._client

    def close(self) -> None:
        self._client.close()

    def send(self, model: str, inputs: list[Any], outputs: list[Any]) -> Callable[[], Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def answered(result: Any, error: Exception | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._client.async_infer(
            model, inputs, answered, outputs=outputs, client_timeout=self._timeout_s
        )
        return future.result


class _HttpClients:
    """One client a thread: tritonclient's HTTP client belongs to the thread that made it."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton
        self._local = threading.local()

    def get(self) -> Any:
        if not hasattr(self._local, "client"):
            self._local.client = self._triton._api.InferenceServerClient(
                self._triton.address,
                concurrency=8,
                connection_timeout=self._triton.timeout_s,
                network_timeout=self._triton.timeout_s,
            )
        return self._local.client

    def close(self) -> None:
        if hasattr(self._local, "client"):
            self._local.client.close()
            del self._local.client

    def send(self, model: str, inputs: list[Any], outputs: list[Any]) -> Callable[[], Any]:
        pending = self.get().async_infer(model, inputs, outputs=outputs)
        return lambda: pending.get_result(timeout=self._triton.timeout_s)


class _Translated:
    """Turns what tritonclient raises into the errors of `halimede_ops.errors`."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, errors.HalimedeError) or not isinstance(error, Exception):
            return
        if isinstance(error, InferenceServerException):
            self._from_triton(error)
        if isinstance(error, TimeoutError) or type(error).__name__ == "Timeout":
            raise self._deadline() from error
        if isinstance(error, (OSError, ConnectionError)) or "HTTP" in type(error).__name__:
            raise self._unreachable() from error

    def _from_triton(self, error: InferenceServerException) -> NoReturn:
        status = str(error.status() or "").removeprefix("StatusCode.")
        message = re.sub(r"^in ensemble '[^']*', ", "", _plain(error.message()))
        if "maximum queue size" in message:
            raise errors.ServerOverloaded(
                f"the server at {self.address} has a full queue. Back off and send again."
            ) from error
        named, _, rest = message.partition(": ")
        error_class = getattr(errors, named, None)
        if isinstance(error_class, type) and issubclass(error_class, errors.HalimedeError):
            raise error_class(rest) from error
        error_class = CODES.get(status, errors.HalimedeError)
        if error_class is errors.DeadlineExceeded:
            raise self._deadline() from error
        if error_class is errors.ServerUnreachable:
            raise self._unreachable() from error
        raise error_class(message) from error

    def _deadline(self) -> errors.DeadlineExceeded:
        return errors.DeadlineExceeded(
            f"{self.address} did not answer within {self.timeout_s:g} s. Raise timeout_s, or "
            "send less at once."
        )

    def _unreachable(self) -> errors.ServerUnreachable:
        return errors.ServerUnreachable(
            f"no Triton answers at {self.address}. Start one with `make serve`, or give its "
            "address as url."
        )


def _plain(message: str) -> str:
    """The text of an error: over HTTP tritonclient sometimes gives the JSON around it."""
    try:
        return str(json.loads(message)["error"])
    except (ValueError, KeyError, TypeError):
        return message


def _parse(url: str) -> tuple[str, str]:
    """Protocol (`grpc` or `http`) and `host:port` of a server's url."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.scheme not in ("grpc", "http") or not parts.netloc:
        raise errors.InvalidInput(
            f"url is {url!r}; give host:port, grpc://host:port or http://host:port."
        )
    return parts.scheme, parts.netloc
