"""Triton as a provider: one model on one or several servers, over gRPC or HTTP.

Every answer is tied to the space that produced it. Where the config pins the version that it
describes (`version_policy { specific { versions: [n] } }`, n unique to the content), the answer's
own version says it. Elsewhere the config is read again after the answer: an answer counts only if
the config was the same before it was asked for and after it came. Answers that come at the same
time share one such reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import itertools
import json
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FilePath, field_validator, model_validator
from tritonclient.utils import InferenceServerException

from halimede.breaker import Breaker
from halimede.items import Item, Kind, Pair
from halimede.latest import Latest
from halimede.providers.base import (
    KINDS_BY_INPUT,
    PROBES,
    Answer,
    Request,
    unknown_tokens,
    unsupported,
)
from halimede.providers.base import Options as BaseOptions
from halimede.results import IMAGE, MAX_IMAGE_BYTES, ServedModel
from halimede_ops import errors

T = TypeVar("T")

CODES = {
    "INVALID_ARGUMENT": errors.InvalidInput,
    "400": errors.InvalidInput,
    "NOT_FOUND": errors.ModelNotFound,
    "404": errors.ModelNotFound,
    "UNAVAILABLE": errors.ServerUnreachable,
    "CANCELLED": errors.ServerUnreachable,
    "503": errors.ServerUnreachable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "499": errors.DeadlineExceeded,
    "RESOURCE_EXHAUSTED": errors.OutOfMemory,
}
"""Error class of a gRPC status name or an HTTP status code."""
INPUTS: Mapping[Kind, str] = {"text": "TEXT", "image": "IMAGE"}
OUTPUTS: Mapping[Kind, tuple[str, ...]] = {
    "text": ("EMBEDDING", "TOKENS"),
    "image": ("EMBEDDING", "WIDTH", "HEIGHT", "FORMAT"),
    "pair": ("EMBEDDING",),
}
OUT_OF_MEMORY = re.compile(r"out of memory|bad_alloc|failed to allocate", re.IGNORECASE)
NOT_LOADED = re.compile(r"not (?:at )?ready|is unloading|being loaded", re.IGNORECASE)
SCHEMES = ("grpc", "grpcs", "http", "https")
LARGEST_MESSAGE_BYTES = 2**31 - 1
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    # gRPC waits up to two minutes between connections: a server's return would be noticed late.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection may die unnoticed behind a balancer: while a call waits, gRPC asks twice at most
    # (its max_pings_without_data), which servers' default limit of ping strikes takes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A name of several servers, such as a headless service's: requests go to each in turn.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    # A channel of its own: a dead connection must not be shared with another embedder.
    ("grpc.use_local_subchannel_pool", 1),
]


class Tls(BaseModel):
    """Certificates for `grpcs://` and `https://`, each a PEM file."""

    model_config = ConfigDict(extra="forbid")

    ca_file: FilePath | None = None
    """Certificates that sign servers; None: those that this machine trusts."""
    cert_file: FilePath | None = None
    """Certificate of this client, for servers that ask for one."""
    key_file: FilePath | None = None
    """Key of the certificate."""

    @model_validator(mode="after")
    def _is_whole(self) -> Tls:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together; give both")
        return self

    def for_grpc(self) -> dict[str, Any]:
        """Arguments of tritonclient's gRPC client."""
        named = {"root_certificates": self.ca_file, "certificate_chain": self.cert_file}
        named["private_key"] = self.key_file
        return {name: str(path) for name, path in named.items() if path is not None}

    def for_http(self) -> ssl.SSLContext:
        """Context of an HTTP client."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


class Options(BaseOptions):
    """A model served by Triton."""

    provider: str = "triton"
    url: tuple[str, ...] = ("127.0.0.1:8001",)
    """Servers: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP; with TLS
    `grpcs://` and `https://`."""
    tls: Tls = Field(default_factory=Tls)

    @field_validator("url", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty; give at least one address")
        for url in value:
            _parse(url)
        return value


def connect(options: Options) -> Triton:
    """The provider for these options."""
    return Triton(options.model_id, options.url, options.tls)


async def models(options: Options) -> list[ServedModel]:
    """Every embedding model that is ready on these options' server, by name."""
    triton = connect(options)
    try:
        return await triton.models(options.timeout_s)
    finally:
        await triton.close()


class Triton:
    """One model on one or several Triton servers."""

    def __init__(self, model: str, urls: Sequence[str], tls: Tls | None = None) -> None:
        self.name = f"triton:{model}"
        self._servers = [_Server(url, model, tls or Tls()) for url in urls]
        self._turn = itertools.count()

    async def close(self) -> None:
        """Close every connection; a second call does nothing."""
        await asyncio.gather(*[server.close() for server in self._servers])

    async def describe(self, timeout_s: float, kind: Kind | None = None) -> ServedModel:
        """The model as a server's config tells it now.

        Raises:
            ModelNotFound: the server has no such model, or it is none of halimede's ensembles.
            UnsupportedInput: it embeds no items of this kind, nor does the model it names.
        """
        return await self._on_one(lambda server: server.describe(timeout_s, kind))

    async def health(self, timeout_s: float) -> None:
        """Nothing when a server embeds a probe."""
        await self._on_one(lambda server: server.probe(timeout_s))

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer of the server that has least to do."""
        return await self._on_one(lambda server: server.embed(request, timeout_s))

    async def models(self, timeout_s: float) -> list[ServedModel]:
        """Every embedding model that is ready, by name."""
        return await self._on_one(lambda server: server.models(timeout_s))

    async def _on_one(self, ask: Callable[[_Server], Awaitable[T]]) -> T:
        """What the least busy server answers; the next is asked when one cannot be reached."""
        *others, last = self._by_load()
        for server in others:
            with contextlib.suppress(errors.ServerUnreachable):
                return await server.guarded(ask(server))
        return await last.guarded(ask(last))

    def _by_load(self) -> list[_Server]:
        """Servers in the order to ask them: those that answer first, then the least busy."""
        turn = next(self._turn)
        count = len(self._servers)
        rotated = [self._servers[(turn + index) % count] for index in range(count)]
        return sorted(rotated, key=lambda server: (server.breaker.is_open, server.in_flight))


class _Server:
    """One address: its connection, its breaker, and what its config last said."""

    def __init__(self, url: str, model: str, tls: Tls) -> None:
        scheme, self.address = _parse(url)
        self.is_grpc = scheme.startswith("grpc")
        self.tls = tls if scheme.endswith("s") else None
        self.model = model
        self.in_flight = 0
        self.breaker = Breaker(self.probe)
        self._api: Any = importlib.import_module(f"tritonclient.{scheme.rstrip('s')}.aio")
        self._client: Any = None
        self._described: dict[Kind, ServedModel] = {}
        self._readings: dict[Kind | None, Latest[ServedModel]] = {}
        self._timeout_s = 30.0

    async def guarded(self, asking: Awaitable[T]) -> T:
        """What the server answers, counted as in flight and told to the breaker."""
        self.in_flight += 1
        try:
            answer = await asking
        except errors.HalimedeError as error:
            if isinstance(error, (errors.ServerUnreachable, errors.DeadlineExceeded)):
                self.breaker.failed()
            raise
        finally:
            self.in_flight -= 1
        self.breaker.succeeded()
        return answer

    async def close(self) -> None:
        await self.breaker.close()
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def describe(self, timeout_s: float, kind: Kind | None = None) -> ServedModel:
        self._timeout_s = timeout_s
        if kind not in self._readings:
            self._readings[kind] = Latest(functools.partial(self._read, kind))
        return await self._readings[kind].read()

    async def probe(self, timeout_s: float) -> None:
        model = await self.describe(timeout_s)
        await self._infer(model.name, Request([PROBES[model.input]], model.input), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        kind = request.kind
        before = self._described.get(kind) or await self.describe(timeout_s, kind)
        result = await self._infer(before.name, request, timeout_s)
        if before.version:
            after = self._version(result) == before.version
        else:
            after = await self.describe(timeout_s, kind) == before
        if not after:
            self._described.clear()
            raise errors.ModelChanged(
                f"{self.model} on {self.address} was changed while it was asked. Send again."
            )
        # A copy: an array over the response's own buffer would keep all of it alive.
        vectors = np.array(result.as_numpy("EMBEDDING"))
        if kind == "text":
            return Answer(vectors, np.array(result.as_numpy("TOKENS")).reshape(-1), before)
        images = _images(result) if kind == "image" else None
        return Answer(vectors, unknown_tokens(len(vectors)), before, images)

    async def models(self, timeout_s: float) -> list[ServedModel]:
        index = await self._call("get_model_repository_index", timeout_s=timeout_s)
        listed = index
        if self.is_grpc:
            listed = [{"name": entry.name, "state": entry.state} for entry in index.models]
        names = sorted(entry["name"] for entry in listed if entry["state"] == "READY")
        served = [await self._served(name, timeout_s) for name in names]
        return [model for model in served if model is not None]

    async def _read(self, kind: Kind | None) -> ServedModel:
        """The model that is named, or the one it names for images."""
        named = await self._ensemble(self.model)
        served = named
        if kind == "image" and named.input == "text" and named.image_model:
            served = await self._ensemble(named.image_model)
        if kind not in (None, served.input):
            raise unsupported(kind, f"triton:{self.model}", named.input)
        self._described[served.input] = served
        return served

    async def _ensemble(self, model: str) -> ServedModel:
        served = await self._served(model, self._timeout_s)
        if served is None:
            raise errors.ModelNotFound(f"{model!r} is a step of a model; ask for the model itself.")
        return served

    async def _served(self, model: str, timeout_s: float) -> ServedModel | None:
        """The model as its config tells; None for a step of a model."""
        answer = await self._call("get_model_config", model, timeout_s=timeout_s)
        return _of_message(answer.config) if self.is_grpc else _of_json(answer)

    async def _infer(self, model: str, request: Request, timeout_s: float) -> Any:
        rows = len(request.items)
        inputs = [
            self._input(name, "BYTES", np.array(values, np.object_).reshape(rows, 1))
            for name, values in _columns(request).items()
        ]
        if request.input_type is not None:
            value = np.full((rows, 1), request.input_type.encode(), np.object_)
            inputs.append(self._input("INPUT_TYPE", "BYTES", value))
        if request.dimensions is not None:
            value = np.full((rows, 1), request.dimensions, np.int32)
            inputs.append(self._input("DIMENSIONS", "INT32", value))
        outputs = [self._api.InferRequestedOutput(name) for name in OUTPUTS[request.kind]]
        return await self._call("infer", model, inputs, outputs=outputs, timeout_s=timeout_s)

    async def _call(self, method: str, *arguments: Any, timeout_s: float, **options: Any) -> Any:
        """What tritonclient returns, alike for both protocols; its errors become ours."""
        if self.is_grpc:
            options["client_timeout"] = timeout_s
        with _Translated(self.address, timeout_s):
            answer = getattr(self._connection(), method)(*arguments, **options)
            return await (answer if self.is_grpc else asyncio.wait_for(answer, timeout_s))

    def _connection(self) -> Any:
        if self._client is None:
            self._client = self._api.InferenceServerClient(self.address, **self._secured())
        return self._client

    def _secured(self) -> dict[str, Any]:
        """The client's options, those of TLS among them."""
        if self.is_grpc:
            certificates = self.tls.for_grpc() if self.tls else {}
            return {"channel_args": CHANNEL_OPTIONS, "ssl": self.tls is not None, **certificates}
        context = self.tls.for_http() if self.tls else None
        return {"conn_timeout": None, "ssl": context is not None, "ssl_context": context}

    def _input(self, name: str, datatype: str, value: np.ndarray) -> Any:
        tensor = self._api.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        return tensor

    def _version(self, result: Any) -> str:
        answer = result.get_response()
        return str(answer.model_version if self.is_grpc else answer["model_version"])


def _columns(request: Request) -> Mapping[str, Sequence[Item]]:
    """A request's items as the input tensors they go into; what a pair lacks is left out."""
    if request.kind != "pair":
        return {INPUTS[request.kind]: request.items}
    columns = {}
    for name, values in zip(Pair._fields, zip(*request.items, strict=True), strict=True):
        if None not in values:
            columns[name.upper()] = values
    return columns


def _images(result: Any) -> np.ndarray:
    """What the answer tells of each image."""
    names = zip(IMAGE.names or (), OUTPUTS["image"][1:], strict=True)
    columns = {name: result.as_numpy(output).reshape(-1) for name, output in names}
    images = np.zeros(len(columns["width"]), IMAGE)
    for name, values in columns.items():
        images[name] = values
    return images


def _of_message(config: Any) -> ServedModel | None:
    """The model of a `ModelConfig` message, as gRPC gives it."""
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    versions = list(config.version_policy.specific.versions)
    return _of_facts(config.name, config.max_batch_size, parameters, versions)


def _of_json(config: dict[str, Any]) -> ServedModel | None:
    """The model of a config, as HTTP gives it."""
    given = config.get("parameters", {})
    parameters = {key: value["string_value"] for key, value in given.items()}
    versions = config.get("version_policy", {}).get("specific", {}).get("versions", [])
    return _of_facts(config["name"], config["max_batch_size"], parameters, versions)


def _of_facts(
    name: str, max_batch_size: int, parameters: Mapping[str, str], versions: Sequence[int]
) -> ServedModel | None:
    """The model that a config's parameters describe; None for a step, which has none."""
    if "space" not in parameters:
        return None
    cosine = parameters.get("mean_cosine")
    # A version says what it holds only if its number is one of content, not of order.
    is_pinned = len(versions) == 1 and int(versions[0]) > 1
    return ServedModel(
        name=name,
        space=parameters["space"],
        precision=parameters["precision"],
        dims=int(parameters["dims"]),
        max_tokens=int(parameters.get("max_tokens", 0)),
        max_batch_size=max_batch_size,
        mean_cosine=None if cosine is None else float(cosine),
        version=str(versions[0]) if is_pinned else "",
        input=KINDS_BY_INPUT[parameters.get("input", "text")],
        image_model=parameters.get("image_model", ""),
        max_image_bytes=int(parameters.get("max_image_bytes", MAX_IMAGE_BYTES)),
    )


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
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            raise self._deadline() from None
        # aiohttp's errors that are no OSError, such as a connection closed mid-answer.
        if isinstance(error, OSError) or type(error).__module__.startswith("aiohttp"):
            raise self._unreachable() from None
        if isinstance(error, MemoryError):
            raise errors.OutOfMemory("the client has no memory for this request.") from None

    def _from_triton(self, error: InferenceServerException) -> NoReturn:
        status = str(error.status() or "").removeprefix("StatusCode.")
        message = re.sub(r"^in ensemble '[^']*', ", "", _plain(error.message()))
        if "maximum queue size" in message:
            raise errors.ServerOverloaded(
                f"the server at {self.address} has a full queue. Back off and send again."
            ) from None
        if NOT_LOADED.search(message):
            raise errors.ServerUnreachable(
                f"the server at {self.address} is loading the model. Send again."
            ) from None
        if OUT_OF_MEMORY.search(message):
            raise errors.OutOfMemory(f"the server at {self.address} has no memory left.") from None
        named, _, rest = message.partition(": ")
        error_class = getattr(errors, named, None)
        if isinstance(error_class, type) and issubclass(error_class, errors.HalimedeError):
            raise error_class(rest) from None
        error_class = CODES.get(status, errors.HalimedeError)
        if error_class is errors.DeadlineExceeded:
            raise self._deadline() from None
        if error_class is errors.ServerUnreachable:
            raise self._unreachable() from None
        raise error_class(message) from None

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
    """Protocol (`grpc`, `grpcs`, `http` or `https`) and `host:port` of a server's url."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.scheme not in SCHEMES or not parts.netloc or "@" in parts.netloc:
        given = "has a user or password" if "@" in url else f"is {url!r}"
        raise errors.InvalidInput(
            f"url {given}; give host:port, grpc://host:port or http://host:port, with TLS "
            "grpcs:// or https://."
        )
    return parts.scheme, parts.netloc
