"""Secrets do not belong in a configuration: it names where they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from halimede_ops.errors import InvalidConfig

SECRET_KEY = re.compile(r"(?:^|_)(?:api_?key|key|token|password|passwd|secret)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"^(?:sk-|hf_|Bearer )|://[^/\s]*@")


def refuse_secrets(given: Any, place: str = "") -> None:
    """Raise if a key or a value of the configuration looks like a secret.

    Raises:
        InvalidConfig: one does; the message names its place and does not repeat it.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            inner = f"{place}.{key}" if place else str(key)
            if SECRET_KEY.search(str(key)):
                raise InvalidConfig(_message(inner))
            refuse_secrets(value, inner)
    elif isinstance(given, list):
        for value in given:
            refuse_secrets(value, place)
    elif isinstance(given, str) and SECRET_VALUE.search(given):
        raise InvalidConfig(_message(place))


def _message(place: str) -> str:
    return (
        f"{place} looks like a secret, and secrets do not belong in a configuration. Name the "
        "environment variable that holds it (api_key_env, url_env), or a file (api_key_file)."
    )
