"""What embedders, rerankers and classifiers share: configuration, pipeline, and how calls run."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar

from typing_extensions import Unpack

from halimede.config.resolve import resolve
from halimede.config.schema import Config
from halimede.inputs.content import Input
from halimede.inputs.options import check_options, check_progress
from halimede.inputs.urls import Fetch
from halimede.observability.progress import NO_PROGRESS, Progress, bar
from halimede.pipeline.pipeline import Call, Pipeline
from halimede.pipeline.tasks import Task
from halimede.pipeline.waiting import drive, drive_async
from halimede.providers import Options, Provider
from halimede.results import Result, ServedModel
from halimede_ops.errors import InvalidConfig

R = TypeVar("R", bound=Result)
PROVIDER = ("name", "describe", "embed", "close")
"""Attributes that a provider must have."""


class CallOptions(TypedDict, total=False):
    """Options of every call. `Embedder.embed` explains them."""

    sticky_key: str | None
    deadline_s: float | None


class ClientArguments(TypedDict, total=False):
    """Further arguments of every client. `Embedder` explains them."""

    timeout_s: float | None
    deadline_s: float | None
    config: Config | Mapping[str, Any] | Path | str | None
    providers: Sequence[Provider]


class BaseClient:
    """What embedders, rerankers and classifiers share, blocking or not.

    Each process has its own pipeline, also after a fork.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        model: str | None = None,
        *,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        config: Config | Mapping[str, Any] | Path | str | None = None,
        providers: Sequence[Provider] = (),
    ) -> None:
        """Prepare the providers. Each connects at the first call that needs it.

        Args:
            url: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP. Several
                servers of one model share the load. Default: `HALIMEDE_URL`, else 127.0.0.1:8001.
            model: name of a served model, or of a model in the configuration. Default:
                `HALIMEDE_MODEL`, else the configuration's default model, else all-MiniLM-L6-v2.
            timeout_s: maximum time of one request. Default: `HALIMEDE_TIMEOUT_S`, else 30.
            deadline_s: maximum time of one call. Default: `HALIMEDE_DEADLINE_S`, else none.
            config: a configuration, or the path of its file. Default: `HALIMEDE_CONFIG`.
            providers: your own providers, tried in this order instead of the configuration's
                models.

        Raises:
            InvalidConfig: the configuration or an argument is invalid.
        """
        resolved = resolve(config, url=url, model=model, timeout_s=timeout_s, deadline_s=deadline_s)
        self._set_up(resolved, _checked(providers))

    def _set_up(self, config: Config, providers: tuple[Provider, ...]) -> None:
        self.config = config
        self._providers = providers
        self._is_closed = False
        self._pipelines = {os.getpid(): self._open()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Connections, models and caches stay here. A copy opens its own.
        return _restored, (type(self), self.config, self._providers)

    @property
    def _pipeline(self) -> Pipeline:
        """This process's pipeline. That of a parent process is never used, nor released."""
        pipeline = self._pipelines.get(os.getpid())
        if pipeline is None:
            pipeline = self._pipelines.setdefault(os.getpid(), self._open())
            if self._is_closed:
                pipeline.close()
        return pipeline

    def current_stats(self) -> dict[str, Any]:
        """Statistics of this object so far, as JSON types, of either class without waiting."""
        return self._pipeline.stats()

    def _open(self) -> Pipeline:
        config = self.config
        own = [
            Options.model_validate({"provider": "own", "model_id": provider.name})
            for provider in self._providers
        ]
        return Pipeline(
            own or config.chain(),
            config.rules(),
            Fetch(config.urls),
            providers=self._providers,
            cache=None if config.cache is None else config.cache.open(),
            model_check_s=math.inf if config.cache is None else config.cache.model_check_s,
        )

    def _close(self) -> None:
        self._is_closed = True
        pipeline = self._pipelines.get(os.getpid())
        if pipeline is not None:
            pipeline.close()

    def _call(
        self,
        task: Task[R],
        inputs: Sequence[Input],
        options: Mapping[str, Any],
        progress: Progress,
        first: int = 0,
        may_block: bool = False,
    ) -> Call[R]:
        checked = check_options(task.method, options)
        if checked.deadline_s is None and self.config.deadline_s is not None:
            checked = checked._replace(deadline_s=self.config.deadline_s)
        return Call(inputs, task, checked, first, progress, may_block)


def _checked(providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """Return the providers given.

    Raises:
        InvalidConfig: something is no provider.
    """
    if not isinstance(providers, Iterable):
        raise InvalidConfig(f"providers is {type(providers).__name__}; give a list of providers.")
    for provider in providers:
        lacking = [name for name in PROVIDER if not hasattr(provider, name)]
        if lacking:
            raise InvalidConfig(
                f"providers has a {type(provider).__name__} without {', '.join(lacking)}; see "
                "halimede.Provider."
            )
    return tuple(providers)


def _restored(
    kind: type[BaseClient], config: Config, providers: tuple[Provider, ...]
) -> BaseClient:
    """Make the client of a configuration as it was resolved, without the environment."""
    client = kind.__new__(kind)
    client._set_up(config, providers)
    return client


class BlockingClient(BaseClient):
    """A client that waits for its results. Safe to use from several threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the calls under way, write the cache, and close every connection.

        A second call does nothing.
        """
        self._close()

    @property
    def model(self) -> ServedModel:
        """The first provider's current model."""
        return drive(self._pipeline.describe())

    def clear_cache(self) -> None:
        """Delete every cached value from every tier of the cache.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        self._pipeline.clear_cache()

    def health(self) -> list[dict[str, Any]]:
        """Report each provider: whether it answers a probe, how fast, and its model."""
        return drive(self._pipeline.health())

    def stats(self) -> dict[str, Any]:
        """Statistics of this object so far, as JSON types."""
        return self.current_stats()

    def _run(
        self,
        task: Task[R],
        inputs: Sequence[Input],
        progress: bool,
        options: Mapping[str, Any],
    ) -> R:
        if progress is False:
            call = self._call(task, inputs, options, NO_PROGRESS, may_block=True)
            return drive(self._pipeline.embed(call))
        with bar(check_progress(progress), len(inputs)) as shown:
            return drive(self._pipeline.embed(self._call(task, inputs, options, shown)))


class AsyncClient(BaseClient):
    """A client for asyncio. Cancelling a call cancels its requests."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls under way, write the cache, and close every connection.

        A second call does nothing.
        """
        await asyncio.to_thread(self._close)

    async def describe(self) -> ServedModel:
        """The first provider's current model."""
        return await drive_async(self._pipeline.describe())

    async def clear_cache(self) -> None:
        """Delete every cached value from every tier of the cache.

        Raises:
            HalimedeError: a tier failed. The others are cleared.
        """
        await asyncio.to_thread(self._pipeline.clear_cache)

    async def health(self) -> list[dict[str, Any]]:
        """Report each provider: whether it answers a probe, how fast, and its model."""
        return await drive_async(self._pipeline.health())

    async def stats(self) -> dict[str, Any]:
        """Statistics of this object so far, as JSON types."""
        return self.current_stats()

    async def _run(
        self,
        task: Task[R],
        inputs: Sequence[Input],
        progress: bool,
        options: Mapping[str, Any],
    ) -> R:
        with bar(check_progress(progress), len(inputs)) as shown:
            return await drive_async(self._pipeline.embed(self._call(task, inputs, options, shown)))


class ModelFirst(BaseClient):
    """A client whose first argument is the model's name: no model is its default."""

    def __init__(
        self,
        model: str | None = None,
        *,
        url: str | Sequence[str] | None = None,
        **arguments: Unpack[ClientArguments],
    ) -> None:
        """Prepare the providers, as `Embedder` does. Only the first argument differs.

        `Embedder` begins with the server's address, because most servers have one embedding model
        and it is the default. A reranker or a classifier is never the default, so its name comes
        first.

        Args:
            model: name of a served model, or of a model in the configuration.
            url: address of the server, as for `Embedder`. Default: `HALIMEDE_URL`, else
                127.0.0.1:8001.
            arguments: `timeout_s`, `deadline_s`, `config` and `providers`, as for `Embedder`.

        Raises:
            InvalidConfig: the configuration or an argument is invalid.
        """
        super().__init__(url, model, **arguments)
