"""Prompts go in front of a text. An input type is the name of a prompt."""

from __future__ import annotations

from halimede_ops.errors import UnknownInputType

WITHOUT_PROMPT = ("document", "query")
"""Input types that every model accepts. Without prompts of its own, both add nothing."""


def check_input_type(input_type: str | None, model: str) -> None:
    """Check the input type for a model that has no prompts.

    Raises:
        UnknownInputType: it is neither empty nor one of WITHOUT_PROMPT.
    """
    if input_type and input_type not in WITHOUT_PROMPT:
        raise UnknownInputType(
            f"the input type given is not one of {model}'s: {', '.join(WITHOUT_PROMPT)}. "
            "Omit it for none."
        )
