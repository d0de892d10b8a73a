"""Providers by kind: one file each, imported when a configuration names it."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from halimede.providers.base import Answer, Options, Provider, Request
from halimede_ops.errors import InvalidConfig

__all__ = ["KINDS", "Answer", "Options", "Provider", "Request", "open_providers", "options_of"]

KINDS = ("triton", "onnx", "sentence_transformers", "openai", "ollama", "huggingface", "hash")


def options_of(kind: str) -> type[Options]:
    """Return the options class of a kind.

    Raises:
        InvalidConfig: the kind is unknown.
    """
    return _module(kind).Options


def open_providers(options: Options) -> list[Provider]:
    """Create what the options describe: one provider, or one for each server that shares a load.

    Each connects on first use.

    Raises:
        MissingExtra: an optional package is not installed.
        InvalidConfig: the file or variable of the key does not exist.
        AccessDenied: a key is needed and there is none.
    """
    providers: list[Provider] = _module(options.provider).connect(options)
    return providers


def _module(kind: str) -> Any:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidConfig(f"provider {kind!r} is unknown; use {', '.join(KINDS)}.{hint}")
    return importlib.import_module(f"halimede.providers.{kind}")
