"""`halimede gateway-key`."""

from __future__ import annotations

import secrets
import sys
from typing import Annotated

import typer
import yaml

from halimede.config.validation import validated
from halimede.extras import needs_extra

KEY_BYTES = 32
PREFIX = "hk-"
"""Start of a key, by which it is found in places where it should not be."""


def gateway_key(
    name: Annotated[str, typer.Argument(help="Name of the key in logs and metrics.")],
    models: Annotated[
        list[str] | None, typer.Option(help="Models that it is for, such as 'bge-*'. Default: all.")
    ] = None,
    requests_per_s: Annotated[int | None, typer.Option(help="Maximum requests a second.")] = None,
    tokens_per_min: Annotated[int | None, typer.Option(help="Maximum tokens a minute.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Maximum tokens a day.")] = None,
) -> None:
    """Print a new API key once, and its entry for the file of keys (gateway.keys)."""
    with needs_extra("gateway"):
        from halimede.gateway.edge.keys import Key, sha256

    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    given = {
        "id": name,
        "sha256": sha256(key.encode()),
        "models": models or None,
        "requests_per_s": requests_per_s,
        "tokens_per_min": tokens_per_min,
        "tokens_per_day": tokens_per_day,
    }
    entry = {field: value for field, value in given.items() if value is not None}
    validated(Key, entry, "")
    print(f"The key, which is not shown again: {key}", file=sys.stderr)
    print(yaml.safe_dump([entry], sort_keys=False), end="")
