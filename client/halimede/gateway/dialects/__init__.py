"""The dialects, one file each."""

from __future__ import annotations

from halimede.gateway.dialects import (
    batches,
    cohere,
    health,
    kserve,
    ollama,
    openai,
    platform,
    playground,
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
    playground.DIALECT,
    health.DIALECT,
    weaviate.DIALECT,
    kserve.DIALECT,
)
