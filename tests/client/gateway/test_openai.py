"""OpenAI's dialect, by OpenAI's own SDK."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
from conftest import MODEL
from gateways import assert_alike

TEXTS = ["hello world", "What is Triton?", "a", "", "An ocelot sleeps in the rain. " * 3]


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_vectors_are_those_of_sentence_transformers(
    client: openai.OpenAI, vectors: Any, encoding: Any
) -> None:
    given = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(input=TEXTS, model=MODEL, **given)
    rows = [row.embedding for row in answer.data]
    if encoding == "base64":
        import base64

        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert_alike(rows, vectors(TEXTS))
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    assert answer.usage.total_tokens > len(TEXTS)
