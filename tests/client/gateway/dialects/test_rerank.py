"""Ranking in the dialects of Cohere, Jina and TEI, against CrossEncoder on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import pytest
import torch
import yaml
from gateways import Kinds, gateway, triton_model
from sentence_transformers import CrossEncoder

from halimede.gateway.edge.keys import sha256

QUERY = "Which bird swims?"
DOCUMENTS = [
    "The museum opens at nine.",
    "Penguins swim in cold water.",
    "Wool socks keep feet warm.",
    "",
    "Penguins swim in cold water.",
]
LONG = "An ocelot sleeps in the rain. " * 200


@pytest.fixture
def client(kinds_address: str) -> cohere.ClientV2:
    return cohere.ClientV2(api_key="any", base_url=kinds_address)


@pytest.fixture
def web(kinds_address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=kinds_address, timeout=60) as running:
        yield running


@pytest.fixture(scope="module")
def reference(kinds: Kinds) -> Any:
    """CrossEncoder's scores in 0 … 1 of the documents, by the name of a model."""

    def scores(name: str, documents: list[str] = DOCUMENTS, raw: bool = False) -> np.ndarray:
        model = CrossEncoder(str(kinds.folders / name), device="cpu")
        function = torch.nn.Identity() if raw else torch.nn.Sigmoid()
        pairs = [(QUERY, document) for document in documents]
        return model.predict(pairs, activation_fn=function, show_progress_bar=False)

    return scores


def assert_ranked(given: list[tuple[int, float]], expected: np.ndarray, atol: float = 1e-5) -> None:
    """All documents, the best first, each with its own score."""
    indices, scores = zip(*given, strict=True)
    np.testing.assert_allclose(scores, expected[list(indices)], atol=atol)
    assert list(scores) == sorted(scores, reverse=True)
    assert len(set(indices)) == len(indices)


@pytest.mark.parametrize("name", ["reranker", "logits"])
def test_cohere_v2_ranks(client: cohere.ClientV2, reference: Any, name: str) -> None:
    """Scores are in 0 … 1, also of a model that gives logits."""
    answer = client.rerank(model=name, query=QUERY, documents=DOCUMENTS)
    assert_ranked([(row.index, row.relevance_score) for row in answer.results], reference(name))
    assert len(answer.results) == len(DOCUMENTS)
    assert answer.meta.billed_units.search_units == 1
    best = client.rerank(model=name, query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [row.index for row in best.results] == [row.index for row in answer.results[:2]]


def test_cohere_v1_ranks_objects(kinds_address: str, reference: Any) -> None:
    """Objects are ranked by their text or their rank_fields, and come back whole."""
    client = cohere.Client(api_key="any", base_url=kinds_address)
    documents = [{"text": text, "id": str(n)} for n, text in enumerate(DOCUMENTS)]
    answer = client.rerank(
        model="reranker", query=QUERY, documents=documents, return_documents=True
    )
    assert_ranked(
        [(row.index, row.relevance_score) for row in answer.results], reference("reranker")
    )
    assert [row.document.id for row in answer.results] == [str(row.index) for row in answer.results]
    by_fields = client.rerank(
        model="reranker",
        query=QUERY,
        documents=[{"title": "Birds", "body": text} for text in DOCUMENTS],
        rank_fields=["title", "body"],
        return_documents=False,
    )
    joined = reference("reranker", [f"Birds\n{text}" for text in DOCUMENTS])
    assert_ranked([(row.index, row.relevance_score) for row in by_fields.results], joined)
    assert by_fields.results[0].document is None


def test_jina_ranks(web: httpx.Client, reference: Any) -> None:
    """Jina's clients read model, usage, and the documents, which come back unless refused."""
    body = {"model": "reranker", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    answer = web.post("/v1/rerank", json=body).json()
    rows = answer["results"]
    assert_ranked([(row["index"], row["relevance_score"]) for row in rows], reference("reranker"))
    assert [row["document"]["text"] for row in rows] == [DOCUMENTS[row["index"]] for row in rows]
    assert answer["model"] == "reranker"
    assert answer["usage"]["total_tokens"] > len(DOCUMENTS)
    plain = web.post("/v1/rerank", json={**body, "return_documents": False}).json()
    assert "document" not in plain["results"][0]


@pytest.mark.parametrize("name", ["reranker", "logits"])
@pytest.mark.parametrize("raw", [False, True])
def test_tei_ranks(web: httpx.Client, reference: Any, name: str, raw: bool) -> None:
    """No sigmoid is applied twice, and raw scores are logits of both models."""
    body = {"model": name, "query": QUERY, "texts": DOCUMENTS, "raw_scores": raw}
    rows = web.post("/rerank", json={**body, "return_text": True}).json()
    expected = reference(name, raw=raw)
    assert_ranked([(row["index"], row["score"]) for row in rows], expected, atol=1e-4)
    assert [row["text"] for row in rows] == [DOCUMENTS[row["index"]] for row in rows]
    assert set(web.post("/", json=body).json()[0]) == {"index", "score"}


def test_a_model_is_named_by_a_header(web: httpx.Client) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS}
    answer = web.post("/rerank", json=body, headers={"halimede-model": "logits"})
    assert answer.headers["halimede-model"] == "logits"


def test_without_a_name_the_only_reranker_answers(kinds: Kinds) -> None:
    models = triton_model(kinds.server, "unscaled") | triton_model(kinds.server, "logits")
    with gateway(models, serve_all=False) as address, httpx.Client(base_url=address) as web:
        ranked = web.post("/v2/rerank", json={"query": QUERY, "documents": DOCUMENTS})
        assert ranked.json()["model"] == "logits"
        assert web.post("/rerank", json={"query": QUERY, "texts": ["a"]}).status_code == 200


def test_without_a_name_the_only_reranker_of_a_key_answers(kinds: Kinds, tmp_path: Path) -> None:
    """Models that the key is not for do not count."""
    keys = tmp_path / "keys.yaml"
    key = {"id": "ranker", "sha256": sha256(b"secret"), "models": ["logits"]}
    keys.write_text(yaml.safe_dump([key]))
    with gateway(triton_model(kinds.server, "unscaled"), keys=str(keys)) as address:
        client = cohere.ClientV2(api_key="secret", base_url=address)
        raw = client.with_raw_response.rerank(model="", query=QUERY, documents=DOCUMENTS)
    assert raw.headers["halimede-model"] == "logits"


def test_without_a_name_several_rerankers_are_listed(web: httpx.Client) -> None:
    answer = web.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS})
    assert answer.status_code == 400
    for key in ("message", "detail"):  # Cohere's and Jina's
        assert "logits" in answer.json()[key]
        assert "reranker" in answer.json()[key]
    answer = web.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS})
    assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")


@pytest.mark.parametrize(
    "body",
    [
        {"documents": []},
        {"documents": [{"title": "no text"}]},
        {"documents": [{"text": "a", "year": 10**30}]},
        {"documents": ["a"], "model": "classifier"},
        {"documents": ["a"], "top_n": 0},
        {"documents": "a"},
    ],
)
def test_a_wrong_body_is_refused_in_words(web: httpx.Client, body: Any) -> None:
    answer = web.post("/v1/rerank", json={"model": "reranker", "query": QUERY, **body})
    assert answer.status_code in (400, 422)
    assert answer.json()["message"]


def test_a_cut_document_is_told(client: cohere.ClientV2, web: httpx.Client) -> None:
    """Cohere's meta warns of it. TEI refuses it, unless truncate is true."""
    answer = client.rerank(model="reranker", query=QUERY, documents=["a", LONG])
    assert answer.meta.warnings is not None
    assert "1 text was cut off" in answer.meta.warnings[0]
    body = {"model": "reranker", "query": QUERY, "texts": ["a", LONG]}
    refused = web.post("/rerank", json=body)
    assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")
    assert "input 1 has" in refused.json()["error"]
    cut = web.post("/rerank", json={**body, "truncate": True})
    assert (cut.status_code, cut.headers["halimede-truncated"]) == (200, "1")
