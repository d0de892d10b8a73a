"""Checks of a configuration, with errors that name the place and the nearest valid key.

pydantic finds the problems; its own messages have several lines and repeat the value given.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from halimede_ops.errors import InvalidConfig

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], given: Mapping[str, Any], place: str) -> Model:
    """Return the model of the given keys; `place` is where they are in the configuration.

    Raises:
        InvalidConfig: a key is unknown or a value invalid.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise InvalidConfig(
            "; ".join(_message(problem, model, place) for problem in error.errors())
        ) from None


def check_known(name: str, known: Sequence[str] | Mapping[str, Any], what: str) -> None:
    """Raise unless the name is known.

    Raises:
        InvalidConfig: it is not; the message lists the known names and the nearest of them.
    """
    if name not in known:
        raise InvalidConfig(
            f"{name!r} is not among {what}: {', '.join(known)}.{_suggestion(name, known)}"
        )


def keys_of(model: type[BaseModel]) -> dict[str, str]:
    """Return the keys of a model as a configuration names them: key → field."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Model` or `Model | None`."""
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _message(problem: Any, model: type[BaseModel], place: str) -> str:
    """One of pydantic's problems in our words, without the value given."""
    path = [str(part) for part in problem["loc"]]
    full = ".".join([place, *path] if place else path)
    if problem["type"] == "extra_forbidden":
        known = sorted(keys_of(_model_at(model, path[:-1])))
        return f"{full} is not known.{_suggestion(path[-1], known)} Known: {', '.join(known)}."
    reason = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{full}: {reason}."


def _model_at(model: type[BaseModel], path: Iterable[str]) -> type[BaseModel]:
    """The nested model at a path of keys or field names."""
    for key in path:
        field = model.model_fields.get(keys_of(model).get(key, key))
        model = (field and nested_model(field.annotation)) or model
    return model


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""
