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
"""Of requests beyond the interactive lane: in Triton's queue, those of its default pass them."""
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
    url: tuple[str, ...] = Field(("127.0.0.1:8001",), validate_default=True)
    """Servers: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP; with TLS
    `grpcs://` and `https://`."""
    follow_canary: bool = True
    """Whether a candidate that is served beside the model answers the share it is given."""

    @field_validator("url", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty; give at least one address")
        for url in value:
            parse(url, info.data.get("tls"))  # none, where that was wrong itself
        return value


def connect(options: Options) -> Triton:
    """The provider for these options."""
    return Triton(options.model_id, options.url, options.tls, options.follow_canary)


async def models(options: Options) -> list[ServedModel]:
    """Every embedding model that is ready on these options' server, by name."""
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
        """Close every connection; a second call does nothing."""
        await asyncio.gather(*[server.close() for server in self._servers])

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
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

    def __init__(self, url: str, model: str, tls: Tls, follow_canary: bool) -> None:
        self.model = model
        self.in_flight = 0
        self.breaker = Breaker(self.probe)
        self._triton = Connection(url, tls)
        self._described: dict[InputKind, ServedModel] = {}
        self._readings: dict[InputKind | None, Latest[ServedModel]] = {}
        self._follow_canary = follow_canary
        self._candidates: dict[str, canary.Watch] = {}
        self._timeout_s = 30.0

    async def guarded(self, asking: Awaitable[T]) -> T:
        """What the server answers, counted as in flight and told to the breaker."""
        self.in_flight += 1
        try:
            answer = await asking
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
        if kind not in self._readings:
            self._readings[kind] = Latest(functools.partial(self._read, kind))
        return await self._readings[kind].read()

    async def probe(self, timeout_s: float) -> None:
        model = await self.describe(timeout_s)
        await self._infer(model.name, Request([PROBES[model.input]], model.input), timeout_s)

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        kind = request.kind
        served = self._described.get(kind) or await self.describe(timeout_s, kind)
        candidate = await self._candidate(served)
        if candidate is None:
            return await self._ask(served, timeout_s, request)
        by_candidate = functools.partial(self._ask, candidate, timeout_s)
        by_served = functools.partial(self._ask, served, timeout_s)
        return await canary.split(request, candidate, by_candidate, by_served)

    async def _ask(self, model: ServedModel, timeout_s: float, request: Request) -> Answer:
        """The answer of this model, and of no other that has come under its name."""
        kind = request.kind
        result = await self._infer(model.name, request, timeout_s)
        if model.version:
            is_same = self._version(result) == model.version
        else:
            is_same = await self.describe(timeout_s, kind) == model
        if not is_same:
            self._described.clear()
            self._candidates.clear()
            raise errors.ModelChanged(
                f"{self.model} at {self._triton.address} changed while it was asked. Send again."
            )
        # A copy: an array over the response's own buffer would keep all of it alive.
        vectors = np.array(result.as_numpy("EMBEDDING"))
        if kind == "text":
            return Answer(vectors, np.array(result.as_numpy("TOKENS")).reshape(-1), model)
        images = _images(result) if kind == "image" else None
        return Answer(vectors, unknown_tokens(len(vectors)), model, images)

    async def _candidate(self, served: ServedModel) -> ServedModel | None:
        """The candidate that answers a share of what this model is asked; None: there is none."""
        if not self._follow_canary or not served.version or served.name.endswith(configs.CANDIDATE):
            return None
        if served.name not in self._candidates:
            name = served.name + configs.CANDIDATE
            self._candidates[served.name] = canary.Watch(lambda: self._ready(name))
        found = await self._candidates[served.name].look()
        return found if found is not None and canary.may_answer(found, served) else None

    async def _ready(self, model: str) -> ServedModel | None:
        """The model as its config tells; None when it is not ready."""
        is_ready = await self._triton.call("is_model_ready", model, timeout_s=self._timeout_s)
        return await self._served(model, self._timeout_s) if is_ready else None

    async def models(self, timeout_s: float) -> list[ServedModel]:
        index = await self._triton.call("get_model_repository_index", timeout_s=timeout_s)
        listed = index
        if self._triton.is_grpc:
            listed = [{"name": entry.name, "state": entry.state} for entry in index.models]
        names = sorted(entry["name"] for entry in listed if entry["state"] == "READY")
        served = [await self._served(name, timeout_s) for name in names]
        return [model for model in served if model is not None]

    async def _read(self, kind: InputKind | None) -> ServedModel:
        """The model that is named, or the one it names for images."""
        named = await self._ensemble(self.model)
        served = named
        if kind == "image" and named.input == "text" and named.image_model:
            served = await self._ensemble(named.image_model)
        if kind not in (None, served.input):
            raise input_kinds.unsupported(kind, f"triton:{self.model}", named.input)
        self._described[served.input] = served
        return served

    async def _ensemble(self, model: str) -> ServedModel:
        served = await self._served(model, self._timeout_s)
        if served is None:
            raise errors.ModelNotFound(f"{model!r} is a step of a model; ask for the model itself.")
        return served

    async def _served(self, model: str, timeout_s: float) -> ServedModel | None:
        """The model as its config tells; None for a step of a model."""
        answer = await self._triton.call("get_model_config", model, timeout_s=timeout_s)
        return _of_message(answer.config) if self._triton.is_grpc else _of_json(answer)

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
        return await self._triton.call(
            "infer",
            model,
            inputs,
            outputs=outputs,
            priority=0 if rows <= batching.INTERACTIVE_ROWS else BULK_PRIORITY,
            headers=tracing.headers(),
            timeout_s=timeout_s,
        )

    def _input(self, name: str, datatype: str, value: np.ndarray) -> Any:
        tensor = self._triton.api.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        return tensor

    def _version(self, result: Any) -> str:
        answer = result.get_response()
        return str(answer.model_version if self._triton.is_grpc else answer["model_version"])


def _columns(request: Request) -> Mapping[str, Sequence[Content]]:
    """A request's items as the input tensors they go into; what a pair lacks is left out."""
    if request.kind != "pair":
        return {INPUTS[request.kind]: request.inputs}
    columns = {}
    for name, values in zip(Pair._fields, zip(*request.inputs, strict=True), strict=True):
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
        input=input_kinds.BY_PARAMETER[parameters.get("input", "text")],
        image_model=parameters.get("image_model", ""),
        max_image_bytes=int(parameters.get("max_image_bytes", MAX_IMAGE_BYTES)),
        share=float(parameters.get(configs.SHARE, 0)),
    )
