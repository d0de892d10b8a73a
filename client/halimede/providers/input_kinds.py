"""Which kinds of inputs a provider embeds, and the error for every other kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from halimede.inputs.content import KINDS, METHODS, TEXT_KINDS, InputKind, ModelKind, plural
from halimede.providers.base import Request
from halimede_ops.errors import UnsupportedInput

BY_PARAMETER: Mapping[str, InputKind] = {"text": "text", "image": "image", "multimodal": "pair"}
"""The kind for each value of a built model's config parameter `input`."""


def input_of(model_kind: ModelKind, parameter: str) -> InputKind:
    """The kind of a built model's inputs, from its own kind and its config parameter `input`."""
    return "text_pair" if model_kind == "reranker" else BY_PARAMETER[parameter or "text"]


def texts_of(request: Request, provider: str) -> Sequence[bytes]:
    """Return the texts of a request, for a provider of text models that gives vectors.

    Raises:
        UnsupportedInput: its inputs are not texts, or it asks for another output.
    """
    if (request.kind, request.output) != ("text", "vector"):
        raise unsupported(request.kind, provider, "text")
    return cast(Sequence[bytes], request.inputs)


def check_texts(kind: InputKind | None, provider: str) -> None:
    """Check that a kind is of texts, for a provider of text models. None is its own kind.

    Raises:
        UnsupportedInput: it is another kind.
    """
    if kind is not None and kind not in TEXT_KINDS:
        raise unsupported(kind, provider, "text")


def is_of(kind: InputKind | None, own: InputKind) -> bool:
    """Whether a model whose own inputs are of kind `own` is the one to describe for `kind`.

    What a model of texts gives for texts or text pairs, its description says.
    """
    return kind in (None, own) or (kind in TEXT_KINDS and own in TEXT_KINDS)


def unsupported(
    kind: InputKind, provider: str, supported: InputKind, model_kind: ModelKind = "dense"
) -> UnsupportedInput:
    """Return the error of a provider that takes only inputs of the supported kind."""
    verb, method = "embeds", METHODS[supported]
    if model_kind != "dense":
        what, method = KINDS[model_kind]
        verb = f"is {what}, for"
    return UnsupportedInput(
        f"{provider} {verb} {plural(supported)}, not {plural(kind)}: call {method}, or name "
        "another model."
    )
