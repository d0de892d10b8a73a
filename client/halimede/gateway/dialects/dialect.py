"""What a dialect is: its paths, the bodies that it reads, and its shape of an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)

from halimede.gateway.errors import Problem

MAX_ITEMS = 2**16
"""Maximum items of a list in a body."""


def _bounded(schema: Any) -> Any:
    """Let each list of a schema end at its first error, and have at most MAX_ITEMS: an error for
    each of a million items would take a thousand times the body's memory.
    """
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple"):
            schema["fail_fast"] = True
            schema.setdefault("max_length", MAX_ITEMS)
        for part in schema.values():
            _bounded(part)
    elif isinstance(schema, (list, tuple)):
        for part in schema:
            _bounded(part)
    return schema


class Body(BaseModel):
    """A body of a request, as JSON. Fields that are not known are ignored, and those that are null
    have their default, as other servers do.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return _bounded(handler(source))

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: part for key, part in value.items() if part is not None}
        return value


B = TypeVar("B", bound=Body)


class Dialect(NamedTuple):
    """How the programs of another server or API ask, and are answered."""

    name: str
    router: APIRouter
    error: Callable[[Problem], tuple[int, Any]]
    """Returns the status and the body of a problem."""


def reads(kind: type[B]) -> Any:
    """Return the annotation of an endpoint's parameter that is the body of the request.

    pydantic reads the JSON itself: that is faster than FastAPI's own way, and the Content-Type does
    not matter, as with Ollama and in most examples with curl.
    """

    async def read(request: Request) -> B:
        try:
            return kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise invalid(error) from None

    return Depends(read)


def takes(kind: type[Body]) -> dict[str, Any]:
    """Return what OpenAPI says of an endpoint's body."""
    schema: dict[str, Any] = {}
    BODIES.setdefault(kind, []).append(schema)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


BODIES: dict[type[Body], list[dict[str, Any]]] = {}
"""Every kind of body, and its places in OpenAPI. They are filled once all kinds are known, because
dialects have kinds of the same name."""


def invalid(error: Any) -> Problem:
    """Return what is wrong with a body, or another input of FastAPI's, without any of it."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(400, "The body is no JSON.")
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    where = ".".join(part for part in place if part.isidentifier() or part.isdecimal())
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    return Problem(422, f"{where or 'The body'}: {reason}.", param=place[0] if place else None)


MAX_PATH = 256
"""Characters of a path in which its dialect is looked for."""
_at: dict[str, Dialect] = {}


def register(dialect: Dialect) -> Dialect:
    """Remember the paths of a dialect, for errors that are met before its endpoints."""
    for route in dialect.router.routes:
        _at.setdefault(route.path, dialect)  # type: ignore[attr-defined]
    return dialect


def dialect_at(path: str) -> Dialect:
    """Return the dialect of a path, or of the path above it that has one; else OpenAI's."""
    path = path[:MAX_PATH]
    while path and path not in _at:
        path = path.rpartition("/")[0]
    return _at.get(path) or _at["/v1/embeddings"]
