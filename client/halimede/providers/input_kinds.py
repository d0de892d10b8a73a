"""Which kinds of inputs a provider embeds, and the error for every other kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from halimede.inputs.content import EMBEDDER_METHODS, InputKind
from halimede.providers.base import Request
from halimede_ops.errors import UnsupportedInput

BY_PARAMETER: Mapping[str, InputKind] = {"text": "text", "image": "image", "multimodal": "pair"}
"""The kind for each value of a built model's config parameter `input`."""


def texts_of(request: Request, provider: str) -> Sequence[bytes]:
    """Return the texts of a request.

    Raises:
        UnsupportedInput: its inputs are not texts.
    """
    check_texts(request.kind, provider)
    return cast(Sequence[bytes], request.inputs)


def check_texts(kind: InputKind | None, provider: str) -> None:
    """Check that a kind is text, for a provider of text models. None is the provider's own kind.

    Raises:
        UnsupportedInput: it is another kind.
    """
    if kind not in (None, "text"):
        raise unsupported(kind, provider, "text")


def unsupported(kind: InputKind, provider: str, supported: InputKind) -> UnsupportedInput:
    """Return the error of a provider that embeds only inputs of the supported kind."""
    return UnsupportedInput(
        f"{provider} embeds {supported}s, not {kind}s: call {EMBEDDER_METHODS[supported]}, or "
        "name another model."
    )
