"""Providers by kind: one file each, imported when a configuration names it."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from halimede.providers.base import Answer, Options, Provider, Request
from halimede_ops.errors import InvalidConfig

__all__ = ["KINDS", "Answer", "Options", "Provider", "Request", "open_provider", "options_of"]

KINDS = ("triton", "onnx", "sentence_transformers", "openai", "ollama", "huggingface", "hash")


def options_of(kind: str) -> type[Options]:
    """Return the options class of a kind.

    Raises:
        InvalidConfig: the kind is unknown.
    """
    return _module(kind).Options


def open_provider(options: Options) -> Provider:
    """Create the provider that the options describe. It connects on first use.

    Raises:
        MissingExtra: its optional package is not installed.
        InvalidConfig: the file or variable of its key does not exist.
        AccessDenied: it needs a key and has none.
    """
    return _module(options.provider).connect(options)


def _module(kind: str) -> Any:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidConfig(f"provider {kind!r} is unknown; use {', '.join(KINDS)}.{hint}")
    return importlib.import_module(f"halimede.providers.{kind}")
