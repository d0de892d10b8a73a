"""A connection to a Triton server over HTTP, with binary tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as messages

from halimede.pipeline.pool import Pool
from halimede.pipeline.waiting import Future
from halimede.providers.http_errors import from_status, timed_out
from halimede.providers.triton.connection import Address, Tls, explained
from halimede_ops import errors

REQUESTS_IN_FLIGHT = 64
GATEWAY_FAILED = (502, 503, 504)
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header with the length of the JSON in front of the binary tensors."""
REASONED = {400: errors.InvalidInput, 404: errors.ModelNotFound}
"""Error class of a status whose message is Triton's own, and says what to change."""


class HttpConnection:
    """HTTP connections to one server, and a pool of threads that use them."""

    def __init__(self, address: Address, tls: Tls) -> None:
        self.address = address
        self._tls = tls
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._is_closed = False
        self._pool = Pool(REQUESTS_IN_FLIGHT, "http")

    def start(
        self,
        method: str,
        message: Any,
        timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        may_block: bool = False,
    ) -> Future[Any]:
        """Start a request in a thread: see `Connection.start`."""
        return self._pool.submit(self._send, method, message, timeout_s, headers or {})

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()
        with self._lock:
            self._is_closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _send(self, method: str, message: Any, timeout_s: float, headers: Mapping[str, str]) -> Any:
        path, content, more = _encoded(method, message)
        try:
            answer = self._opened().request(
                "GET" if content is None else "POST",
                self.address.url + path,
                content=content,
                headers={**headers, **more},
                timeout=timeout_s,
            )
        except httpx.TimeoutException:
            raise timed_out(str(self.address), timeout_s) from None
        except httpx.RemoteProtocolError as error:
            if "disconnected" in str(error) or "incomplete" in str(error):  # it died
                raise self.address.unreachable() from None
            raise self.address.not_triton("it does not answer in HTTP") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError):
            raise self.address.unreachable() from None
        if method == "ModelReady":
            return messages.ModelReadyResponse(ready=answer.status_code == 200)
        if answer.status_code != 200:
            raise self._failed(answer)
        try:
            return _decoded(method, answer)
        except (ValueError, KeyError, TypeError, IndexError, json_format.ParseError):
            raise self.address.not_triton("its answer is none of Triton's") from None

    def _opened(self) -> httpx.Client:
        with self._lock:
            if self._is_closed:
                raise self.address.unreachable()
            if self._client is None:
                limits = httpx.Limits(max_connections=REQUESTS_IN_FLIGHT)
                self._client = httpx.Client(
                    verify=self._tls.for_http() if self.address.is_secure else False,
                    trust_env=not self.address.is_loopback,
                    limits=limits,
                )
            return self._client

    def _failed(self, answer: httpx.Response) -> errors.HalimedeError:
        status = answer.status_code
        try:
            message = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):  # not Triton's own words: they are not shown
            if status in GATEWAY_FAILED and self.address.proxy is not None:
                return self.address.unreachable()
            if status in (400, 404, 405):
                return self.address.not_triton(f"it answers {status}")
            return from_status(str(self.address), status, answer.headers)
        known = explained(message, self.address)
        if known is not None:
            return known
        if status in REASONED:
            return REASONED[status](message)
        return from_status(str(self.address), status, answer.headers)


def _encoded(method: str, message: Any) -> tuple[str, bytes | None, dict[str, str]]:
    """Path, body and headers of a request. A request without a body is a GET."""
    if method == "RepositoryIndex":
        return "/v2/repository/index", b"{}", {}
    if method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        verb = method.removeprefix("RepositoryModel").lower()
        values = {name: value.bool_param for name, value in message.parameters.items()}
        body = json.dumps({"parameters": values}).encode()
        return f"/v2/repository/models/{message.model_name}/{verb}", body, {}
    name = message.name if hasattr(message, "name") else message.model_name
    if method != "ModelInfer":
        return f"/v2/models/{name}/{'config' if method == 'ModelConfig' else 'ready'}", None, {}
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": len(raw)},
        }
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    ]
    outputs = [{"name": one.name, "parameters": {"binary_data": True}} for one in message.outputs]
    header: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
    if message.parameters:
        header["parameters"] = {key: one.uint64_param for key, one in message.parameters.items()}
    packed = json.dumps(header).encode()
    body = b"".join([packed, *message.raw_input_contents])
    return f"/v2/models/{name}/infer", body, {HEADER_LENGTH: str(len(packed))}


def _decoded(method: str, answer: httpx.Response) -> Any:
    """Return a body as the message of Triton's gRPC service."""
    if method == "RepositoryIndex":
        rows = {"models": answer.json()}
        return json_format.ParseDict(rows, messages.RepositoryIndexResponse(), True)
    if method == "ModelConfig":
        response = messages.ModelConfigResponse()
        json_format.ParseDict(answer.json(), response.config, ignore_unknown_fields=True)
        if not response.config.name:
            raise ValueError
        return response
    if method != "ModelInfer":
        return None
    body = answer.content
    length = int(answer.headers.get(HEADER_LENGTH, len(body)))
    header = json.loads(body[:length])
    response = messages.ModelInferResponse(
        model_name=header["model_name"], model_version=header["model_version"]
    )
    for output in header["outputs"]:
        size_bytes = output["parameters"]["binary_data_size"]
        response.outputs.add(
            name=output["name"], datatype=output["datatype"], shape=output["shape"]
        )
        response.raw_output_contents.append(body[length : length + size_bytes])
        length += size_bytes
    return response
