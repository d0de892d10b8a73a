"""Tokenizers of the gateway's models: those of a model repository on this machine."""

from __future__ import annotations

import asyncio

from halimede.documents import tokenizers
from halimede.documents.tokenizers import ModelTokenizer
from halimede.gateway.errors import Problem
from halimede.gateway.models.served import Model
from halimede_ops.errors import ModelNotFound, SpaceRefused, UnsupportedInput


async def tokenizer_of(model: Model) -> ModelTokenizer:
    """Return the tokenizer of a served model.

    Raises:
        Problem: the repository on this machine has not this model, or has another one of its name.
        MissingExtra: the package tokenizers is not installed.
    """
    served = await model.facts()
    try:
        folder = tokenizers.folder_of(model.options, served)
    except (UnsupportedInput, ModelNotFound, SpaceRefused) as error:
        raise Problem(501, str(error)) from None
    return await asyncio.to_thread(tokenizers.read, folder)
