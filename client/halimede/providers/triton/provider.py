"""Triton as a provider: one model on one or several servers, over gRPC or HTTP.

Every answer is tied to the space that produced it. If the config pins a version
(`version_policy { specific { versions: [n] } }`, n unique to the content), the answer's own version
proves it. Otherwise the config is read again after the answer, and the answer counts only if the
config did not change. Answers that arrive at the same time share one such read.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from halimede.inputs.content import Content, InputKind, Pair
from halimede.observability import tracing
from halimede.pipeline.breaker import Breaker, Breakers, is_down
from halimede.pipeline.latest import Latest
from halimede.providers import input_kinds
from halimede.providers.answers import unknown_tokens
from halimede.providers.base import Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.providers.probe import PROBES
from halimede.providers.triton import canary
from halimede.providers.triton.connection import Connection, Tls, parse
from halimede.results import IMAGE, MAX_IMAGE_BYTES, ServedModel
from halimede_engine import batching
from halimede_ops import errors
from halimede_repository import configs

T = TypeVar("T")

BULK_PRIORITY = 2
"""Priority of bulk requests. Triton's default priority overtakes it in the queue."""
INPUTS: Mapping[InputKind, str] = {"text": "TEXT", "image": "IMAGE"}
OUTPUTS: Mapping[InputKind, tuple[str, ...]] = {
    "text": ("EMBEDDING", "TOKENS"),
    "image": ("EMBEDDING", "WIDTH", "HEIGHT", "FORMAT"),
    "pair": ("EMBEDDING",),
}


class Options(BaseOptions):
    """A model served by Triton."""

    provider: str = "triton"
    tls: Tls = Field(default_factory=Tls)
    """Certificates, for `grpcs://` and `https://`."""
    url: tuple[str, ...] = Field(("127.0.0.1:8001",), validate_default=True)
    """Servers: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP. With TLS:
    `grpcs://` and `https://`."""
    follow_canary: bool = True
    """Let a candidate that is served beside the model answer its share of the requests."""

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
            parse(url, info.data.get("tls"))  # None if tls itself is invalid
        return value


def connect(options: Options) -> Triton:
    """Return the provider for these options."""
    return Triton(options.model_id, options.url, options.tls, options.follow_canary)


async def models(options: Options) -> list[ServedModel]:
    """List the embedding models that are ready on the options' server, by name."""
    triton = connect(options)
    try:
        return await triton.models(options.timeout_s)
    finally:
        await triton.close()


class Triton:
    """One model on one or several Triton servers."""

    def __init__(
        self,
        model: str,
        urls: Sequence[str],
        tls: Tls | None = None,
        follow_canary: bool = True,
    ) -> None:
        self.name = f"triton:{model}"
        self._servers = [_Server(url, model, tls or Tls(), follow_canary) for url in urls]
        self._turn = itertools.count()
        self.breaker = Breakers([server.breaker for server in self._servers])
        """The servers' own breakers. There is no second one around the provider."""

    async def close(self) -> None:
        """Close every connection. A second call does nothing."""
        await asyncio.gather(*[server.close() for server in self._servers])

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """Return the model that a server's config describes now.

        Raises:
            ModelNotFound: the server has no such model, or it is not one of halimede's ensembles.
            UnsupportedInput: neither it nor its image model embeds this kind.
        """
        return await self._on_any_server(lambda server: server.describe(timeout_s, kind))

    async def health(self, timeout_s: float) -> None:
        """Raise unless a server can embed a probe."""
        await self._on_any_server(lambda server: server.probe(timeout_s))

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """Return the answer of the least busy server."""
        return await self._on_any_server(lambda server: server.embed(request, timeout_s))

    async def models(self, timeout_s: float) -> list[ServedModel]:
        """List the embedding models that are ready, by name."""
        return await self._on_any_server(lambda server: server.models(timeout_s))

    async def _on_any_server(self, ask: Callable[[_Server], Awaitable[T]]) -> T:
        """Return the answer of the least busy server that can be reached."""
        *others, last = self._by_load()
        for server in others:
            with contextlib.suppress(errors.ServerUnreachable):
                return await server.guarded(ask(server))
        return await last.guarded(ask(last))

    def _by_load(self) -> list[_Server]:
        """Servers in the order to try them: by open breaker, then by requests in flight."""
        turn = next(self._turn)
        count = len(self._servers)
        rotated = [self._servers[(turn + index) % count] for index in range(count)]
        return sorted(rotated, key=lambda server: (server.breaker.is_open, server.in_flight))


class _Server:
    """One address: its connection, its breaker, and its models as last described."""

    def __init__(self, url: str, model: str, tls: Tls, follow_canary: bool) -> None:
        self.model = model
        self.in_flight = 0
        self.breaker = Breaker(self.probe)
        self._triton = Connection(url, tls)
        self._models: dict[InputKind, ServedModel] = {}
        self._readers: dict[InputKind | None, Latest[ServedModel]] = {}
        self._follow_canary = follow_canary
        self._candidates: dict[str, canary.Watch] = {}
        self._timeout_s = 30.0

    async def guarded(self, request: Awaitable[T]) -> T:
        """Await a request, count it as in flight, and tell the breaker how it went."""
        self.in_flight += 1
        try:
            answer = await request
        except errors.HalimedeError as error:
            if is_down(error):
                self.breaker.failed()
            raise
        finally:
            self.in_flight -= 1
        self.breaker.succeeded()
        return answer

    async def close(self) -> None:
        await self.breaker.close()
        await self._triton.close()

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        self._timeout_s = timeout_s
        if kind not in self._readers:
            self._readers[kind] = Latest(functools.partial(self._read, kind))
        return await self._readers[kind].read()

    async def probe(self, timeout_s: float) -> None:
        model = await self.describe(timeout_s)
        await self._infer(model.name, Request([PROBES[model.input]], model.input), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        kind = request.kind
        served = self._models.get(kind) or await self.describe(timeout_s, kind)
        candidate = await self._candidate(served)
        if candidate is None:
            return await self._ask(served, timeout_s, request)
        by_candidate = functools.partial(self._ask, candidate, timeout_s)
        by_served = functools.partial(self._ask, served, timeout_s)
        return await canary.split(request, candidate, by_candidate, by_served)

    async def _ask(self, model: ServedModel, timeout_s: float, request: Request) -> Answer:
        """Return the answer of exactly this model.

        Raises:
            ModelChanged: another model has its name now.
        """
        kind = request.kind
        result = await self._infer(model.name, request, timeout_s)
        if model.version:
            is_same = self._version(result) == model.version
        else:
            is_same = await self.describe(timeout_s, kind) == model
        if not is_same:
            self._models.clear()
            self._candidates.clear()
            raise errors.ModelChanged(
                f"{self.model} at {self._triton.address} changed during the request. Send again."
            )
        # Copied, since an array over the response's buffer keeps all of it in memory.
        vectors = np.array(result.as_numpy("EMBEDDING"))
        if kind == "text":
            return Answer(vectors, np.array(result.as_numpy("TOKENS")).reshape(-1), model)
        images = _images(result) if kind == "image" else None
        return Answer(vectors, unknown_tokens(len(vectors)), model, images)

    async def _candidate(self, served: ServedModel) -> ServedModel | None:
        """Return the candidate that answers a share of this model's requests, if there is one."""
        if not self._follow_canary or not served.version or served.name.endswith(configs.CANDIDATE):
            return None
        if served.name not in self._candidates:
            name = served.name + configs.CANDIDATE
            self._candidates[served.name] = canary.Watch(lambda: self._ready(name))
        candidate = await self._candidates[served.name].candidate()
        return candidate if candidate and canary.may_answer(candidate, served) else None

    async def _ready(self, model: str) -> ServedModel | None:
        """Return the model that the config describes. None if it is not ready."""
        is_ready = await self._triton.call(
            lambda client, limit: client.is_model_ready(model, **limit), self._timeout_s
        )
        return await self._served(model, self._timeout_s) if is_ready else None

    async def models(self, timeout_s: float) -> list[ServedModel]:
        index = await self._triton.call(
            lambda client, limit: client.get_model_repository_index(**limit), timeout_s
        )
        listed = index
        if self._triton.is_grpc:
            listed = [{"name": entry.name, "state": entry.state} for entry in index.models]
        names = sorted(entry["name"] for entry in listed if entry["state"] == "READY")
        served = [await self._served(name, timeout_s) for name in names]
        return [model for model in served if model is not None]

    async def _read(self, kind: InputKind | None) -> ServedModel:
        """Read the configured model's config, or its image model's for images."""
        named = await self._ensemble(self.model)
        served = named
        if kind == "image" and named.input == "text" and named.image_model:
            served = await self._ensemble(named.image_model)
        if kind not in (None, served.input):
            raise input_kinds.unsupported(kind, f"triton:{self.model}", named.input)
        self._models[served.input] = served
        return served

    async def _ensemble(self, model: str) -> ServedModel:
        served = await self._served(model, self._timeout_s)
        if served is None:
            raise errors.ModelNotFound(f"{model!r} is a step of a model; ask for the model itself.")
        return served

    async def _served(self, model: str, timeout_s: float) -> ServedModel | None:
        """Return the model that the config describes. None for a step of a model."""
        answer = await self._triton.call(
            lambda client, limit: client.get_model_config(model, **limit), timeout_s
        )
        return _from_message(answer.config) if self._triton.is_grpc else _from_json(answer)

    async def _infer(self, model: str, request: Request, timeout_s: float) -> Any:
        rows = len(request.inputs)
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
        outputs = [self._triton.api.InferRequestedOutput(name) for name in OUTPUTS[request.kind]]
        priority = 0 if rows <= batching.INTERACTIVE_ROWS else BULK_PRIORITY
        headers = tracing.headers()
        return await self._triton.call(
            lambda client, limit: client.infer(
                model, inputs, outputs=outputs, priority=priority, headers=headers, **limit
            ),
            timeout_s,
        )

    def _input(self, name: str, datatype: str, value: np.ndarray) -> Any:
        tensor = self._triton.api.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        return tensor

    def _version(self, result: Any) -> str:
        answer = result.get_response()
        return str(answer.model_version if self._triton.is_grpc else answer["model_version"])


def _columns(request: Request) -> Mapping[str, Sequence[Content]]:
    """Values of each input tensor of a request. A tensor that no pair has is left out."""
    if request.kind != "pair":
        return {INPUTS[request.kind]: request.inputs}
    columns = {}
    for name, values in zip(Pair._fields, zip(*request.inputs, strict=True), strict=True):
        if None not in values:
            columns[name.upper()] = values
    return columns


def _images(result: Any) -> np.ndarray:
    """Size and format of each image, as `[rows]` of `results.IMAGE`."""
    names = zip(IMAGE.names or (), OUTPUTS["image"][1:], strict=True)
    columns = {name: result.as_numpy(output).reshape(-1) for name, output in names}
    images = np.zeros(len(columns["width"]), IMAGE)
    for name, values in columns.items():
        images[name] = values
    return images


def _from_message(config: Any) -> ServedModel | None:
    """The model of a `ModelConfig` message, from gRPC."""
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    versions = list(config.version_policy.specific.versions)
    return _from_facts(config.name, config.max_batch_size, parameters, versions)


def _from_json(config: dict[str, Any]) -> ServedModel | None:
    """The model of a config as JSON, from HTTP."""
    items = config.get("parameters", {}).items()
    parameters = {key: value["string_value"] for key, value in items}
    versions = config.get("version_policy", {}).get("specific", {}).get("versions", [])
    return _from_facts(config["name"], config["max_batch_size"], parameters, versions)


def _from_facts(
    name: str, max_batch_size: int, parameters: Mapping[str, str], versions: Sequence[int]
) -> ServedModel | None:
    """The model that a config's parameters describe. None for a step, which has none."""
    if "space" not in parameters:
        return None
    cosine = parameters.get("mean_cosine")
    # Only a number that is derived from the content identifies it; 1 is just the first version.
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
        input=input_kinds.BY_PARAMETER[parameters.get("input", "text")],
        image_model=parameters.get("image_model", ""),
        max_image_bytes=int(parameters.get("max_image_bytes", MAX_IMAGE_BYTES)),
        share=float(parameters.get(configs.SHARE, 0)),
    )
