"""The dialects, one file each."""

from __future__ import annotations

from halimede.gateway.dialects import (
    batches,
    cohere,
    kserve,
    ollama,
    openai,
    platform,
    tei,
    weaviate,
)
from halimede.gateway.dialects.dialect import Dialect

ALL: tuple[Dialect, ...] = (
    openai.DIALECT,
    batches.DIALECT,
    cohere.DIALECT,
    tei.DIALECT,
    ollama.DIALECT,
    platform.DIALECT,
    weaviate.DIALECT,
    kserve.DIALECT,
)
