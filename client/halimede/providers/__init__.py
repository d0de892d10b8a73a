"""Providers by their kind: one file each, imported when one is opened."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from halimede.providers.base import Answer, Options, Provider, Request
from halimede_ops.errors import InvalidConfig

__all__ = ["KINDS", "Answer", "Options", "Provider", "Request", "open_provider", "options_of"]

KINDS = ("triton", "onnx", "sentence_transformers", "openai", "ollama", "huggingface", "hash")


def options_of(kind: str) -> type[Options]:
    """The class of a kind's options.

    Raises:
        InvalidConfig: there is no such kind.
    """
    return _module(kind).Options


def open_provider(options: Options) -> Provider:
    """The provider that these options describe; it connects on first use.

    Raises:
        MissingExtra: its optional package is not installed.
        InvalidConfig: a secret that the options name is not there.
    """
    return _module(options.provider).connect(options)


def _module(kind: str) -> Any:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidConfig(f"provider {kind!r} is unknown; use {', '.join(KINDS)}.{hint}")
    return importlib.import_module(f"halimede.providers.{kind}")
