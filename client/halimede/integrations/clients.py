"""The client of an integration: the one it is given, or one that it opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from typing_extensions import Unpack

from halimede.config.schema import Config
from halimede.embedder import AsyncEmbedder, BaseClient, Embedder
from halimede.providers import Provider
from halimede.reranker import AsyncReranker, Reranker
from halimede_ops.errors import InvalidConfig

Client = TypeVar("Client", bound=BaseClient)


class Arguments(TypedDict, total=False):
    """Further arguments of the client that an integration opens. `Embedder` explains them."""

    url: str | Sequence[str] | None
    timeout_s: float | None
    deadline_s: float | None
    config: Config | Mapping[str, Any] | Path | str | None
    providers: Sequence[Provider]


def open_embedder(
    embedder: Embedder | None, model: str | None, **arguments: Unpack[Arguments]
) -> Embedder:
    """Return the embedder given, or open one with these arguments.

    Raises:
        InvalidConfig: it is no embedder, or there are arguments beside it.
    """
    return _opened(Embedder, "embedder", embedder, {"model": model, **arguments})


def open_reranker(
    reranker: Reranker | None, model: str | None, **arguments: Unpack[Arguments]
) -> Reranker:
    """Return the reranker given, or open one with these arguments.

    Raises:
        InvalidConfig: it is no reranker, or there are arguments beside it.
    """
    return _opened(Reranker, "reranker", reranker, {"model": model, **arguments})


def async_embedder(embedder: Embedder) -> AsyncEmbedder:
    """The asyncio class over an embedder's own connections, models, cache and statistics."""
    return _sharing(AsyncEmbedder, embedder)


def async_reranker(reranker: Reranker) -> AsyncReranker:
    """The asyncio class over a reranker's own connections, models, cache and statistics."""
    return _sharing(AsyncReranker, reranker)


def _opened(
    kind: type[Client], name: str, given: Client | None, arguments: Mapping[str, Any]
) -> Client:
    if given is None:
        return kind(**arguments)
    if not isinstance(given, kind):
        raise InvalidConfig(f"{name} is {type(given).__name__}; give {kind.__name__}(…).")
    beside = [key for key, value in arguments.items() if value is not None]
    if beside:
        raise InvalidConfig(
            f"{name} is given, and {', '.join(beside)} too; give them to the {name} instead."
        )
    return given


def _sharing(kind: type[Client], client: BaseClient) -> Client:
    shared = kind.__new__(kind)
    shared.__dict__ = client.__dict__
    return shared
