"""The reference page of every configuration key, generated from the typed objects."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from halimede import providers
from halimede.config.environment import Settings
from halimede.config.schema import Config
from halimede.config.validation import keys_of, nested_model

INTRODUCTION = """\
# Configuration

<!-- Written by `halimede config reference`. Change the docstrings in the code, not this file. -->

A program configures an embedder with arguments, environment variables and a YAML file. An argument
takes precedence over the environment, the environment over the file, and the file over the
defaults. `halimede config check FILE` checks a file. Secrets do not belong in it: name the
environment variable or the file that holds one (`api_key_env`, `api_key_file`, `url_env`).

```yaml
models:
  minilm: {provider: triton, model_id: all-MiniLM-L6-v2, url: "127.0.0.1:8001"}
  local: {provider: onnx, model_id: all-MiniLM-L6-v2}
fallback: [local]
cache:
  memory_mb: 256
  redis: {url: "redis://127.0.0.1:6379/0"}
```
"""
TYPES = {str: "text", int: "integer", float: "number", bool: "boolean", Path: "path"}
BOUNDS = {"gt": ">", "ge": "≥", "le": "≤"}
MODEL = "models.NAME"


def markdown() -> str:
    """Return the page, in Markdown."""
    common = providers.Options.model_fields
    parts = [INTRODUCTION, *_tables("", Config, Config.model_fields)]
    parts += _tables(MODEL, providers.Options, common)
    for kind in providers.KINDS:
        options = providers.options_of(kind)
        own = {name: field for name, field in options.model_fields.items() if name not in common}
        parts += _tables(MODEL, options, own, f" with `provider: {kind}`")
    variables = {f"HALIMEDE_{name.upper()}": name for name in Settings.model_fields}
    parts.append(_table("Environment variables", Settings, variables))
    return "\n".join(parts)


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field: field → text on one line.

    pydantic can do this too (`use_attribute_docstrings`), but reads the source at every import.
    """
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base.__module__.startswith("halimede"):
            texts |= dict(_documented(base))
    return texts


def _documented(model: type) -> Iterator[tuple[str, str]]:
    """Each field of a class that has a docstring, with the docstring."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str() as value)):
                yield name, " ".join(value.split())


def _tables(
    place: str, model: type[BaseModel], fields: Mapping[str, FieldInfo], condition: str = ""
) -> Iterator[str]:
    """The table of some fields of a model, then those of the models nested in them."""
    keys = {key: name for key, name in keys_of(model).items() if name in fields}
    yield _table(f"`{place}`{condition}" if place else "Top-level keys", model, keys)
    for key, name in keys.items():
        nested = nested_model(fields[name].annotation)
        if nested is not None and key != "models":
            yield from _tables(f"{place}.{key}" if place else key, nested, nested.model_fields)


def _table(title: str, model: type[BaseModel], keys: Mapping[str, str]) -> str:
    """A heading and a table of some keys of a model: key → field."""
    if not keys:
        return f"## {title}\n\nNo further keys.\n"
    texts = descriptions(model)
    lines = [f"## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, name in keys.items():
        field = model.model_fields[name]
        text = texts.get(name, "")
        default = "–" if "Default:" in text else _default(field)
        lines.append(f"| `{key}` | {_type(field)} | {default} | {text} |")
    return "\n".join([*lines, ""])


def _type(field: FieldInfo) -> str:
    """The type of a key, as a YAML file has it, with its bounds."""
    alternatives, bounds = [], list(field.metadata)
    for annotation in _alternatives(field.annotation):
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            bounds += metadata
        alternatives.append(_name(annotation))
    limits = [
        f"{sign} {getattr(bound, attribute):g}"
        for bound in bounds
        for attribute, sign in BOUNDS.items()
        if getattr(bound, attribute, None) is not None
    ]
    return ", ".join([" or ".join(alternatives), *limits])


def _alternatives(annotation: Any) -> list[Any]:
    """The parts of a union, without None."""
    if get_origin(annotation) in (Union, UnionType):
        return [part for part in get_args(annotation) if part is not NoneType]
    return [annotation]


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_name(get_args(annotation)[0])}"
    return TYPES.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    """The default of a key; a dash where it is none, or depends on more than the key."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == () or field.default_factory is not None:
        return "–"
    parts = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"`{_yaml(part)}`" for part in parts)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)
