"""TEI's dialect, by huggingface_hub's InferenceClient and by TEI's documented bodies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
import torch
from conftest import MODEL
from gateways import Kinds, assert_alike, gateway, triton_model
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)
from sentence_transformers import SentenceTransformer, SparseEncoder
from tokenizers import Tokenizer
from transformers import pipeline

from halimede import Embedder
from halimede.gateway.dialects import tei
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TEXTS = [
    "hello world",
    "What is Triton?",
    "",
    "naïve 🦊 中文",
    "An ocelot sleeps in the rain. " * 3,
]
LONG = "An ocelot sleeps in the rain. " * 60


@pytest.fixture
def client(address: str) -> InferenceClient:
    return InferenceClient(model=address)


@pytest.fixture
def web(kinds_address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=kinds_address, timeout=60) as running:
        yield running


def embed(http: httpx.Client, inputs: Any, path: str = "/embed", **options: Any) -> httpx.Response:
    return http.post(path, json={"inputs": inputs, **options})


def refused(answer: httpx.Response) -> tuple[int, str]:
    """Status and type of an error, which has words."""
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error"]
    return answer.status_code, answer.json()["error_type"]


# The InferenceClient.


def test_feature_extraction_gives_the_vectors(client: InferenceClient, vectors: Any) -> None:
    assert_alike(client.feature_extraction(TEXTS), vectors(TEXTS))  # type: ignore[arg-type]
    for text in TEXTS:
        answer = client.feature_extraction(text, normalize=True, truncate=True)
        assert_alike(answer, vectors([text]))


def test_a_prompt_is_prepended(client: InferenceClient, kinds: Kinds, web: httpx.Client) -> None:
    """Also by the names of a model's further prompts, and to tokens."""
    model = SentenceTransformer(str(kinds.folders / "prompted"), device="cpu")
    for name in ("query", "passage"):
        expected = model.encode(TEXTS, prompt_name=name, show_progress_bar=False)
        answer = embed(web, TEXTS, model="prompted", prompt_name=name)
        np.testing.assert_allclose(answer.json(), expected, atol=1e-4)
    with pytest.raises(HfHubHTTPError) as error:
        client.feature_extraction("a", prompt_name="none such")
    assert "input type" in error.value.response.json()["error"]


def test_sentence_similarity_gives_cosines(
    client: InferenceClient, address: str, vectors: Any
) -> None:
    expected = vectors(TEXTS[:1]) @ vectors(TEXTS[1:]).T
    answer = client.sentence_similarity(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(answer, expected[0], atol=1e-4)
    at_path = client.sentence_similarity(TEXTS[0], TEXTS[1:], model=f"{address}/similarity")
    np.testing.assert_allclose(at_path, answer, atol=1e-4)


@pytest.fixture(scope="module")
def labels(kinds: Kinds) -> Any:
    """transformers' scores of a text's or pair's labels, the highest first."""
    run = pipeline("text-classification", str(kinds.folders / "classifier"), top_k=None)
    return lambda text, pair=None: run({"text": text, "text_pair": pair})


def assert_labels(given: Any, expected: Any) -> None:
    assert [row["label"] for row in given] == [row["label"] for row in expected]
    scores = [row["score"] for row in expected]
    np.testing.assert_allclose([row["score"] for row in given], scores, atol=1e-5)


@pytest.mark.parametrize("path", ["", "/predict"])
def test_text_classification_gives_labels(kinds_address: str, labels: Any, path: str) -> None:
    client = InferenceClient(
        model=f"{kinds_address}{path}", headers={"halimede-model": "classifier"}
    )
    assert_labels(client.text_classification("hello world"), labels("hello world"))
    assert len(client.text_classification("hello world", top_k=2)) == 2


# TEI's paths.


def test_embed_gives_a_list_of_vectors(http: httpx.Client, vectors: Any) -> None:
    """For one text, too."""
    for path in ("/", "/embed"):
        assert_alike(embed(http, TEXTS, path).json(), vectors(TEXTS))
        assert_alike(embed(http, TEXTS[0], path).json(), vectors(TEXTS[:1]))
    cut = embed(http, TEXTS, dimensions=64).json()
    assert_alike(cut, vectors(TEXTS)[:, :64])
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)


def test_openai_s_path_needs_no_model(http: httpx.Client, vectors: Any) -> None:
    answer = http.post("/embeddings", json={"input": TEXTS}).json()
    assert_alike([row["embedding"] for row in answer["data"]], vectors(TEXTS))
    assert answer["model"] == MODEL


def test_normalize_gives_vectors_of_length_1(kinds: Kinds, web: httpx.Client) -> None:
    """And without, those that the model gives."""
    model = SentenceTransformer(str(kinds.folders / "unscaled"), device="cpu")
    expected = model.encode(TEXTS, show_progress_bar=False)
    as_given = np.array(embed(web, TEXTS, normalize=False).json())
    np.testing.assert_allclose(as_given, expected, atol=1e-4)
    unit = np.array(embed(web, TEXTS).json())
    np.testing.assert_allclose(
        unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4
    )


def test_vectors_of_length_1_have_no_other(http: httpx.Client) -> None:
    answer = embed(http, TEXTS, normalize=False)
    assert refused(answer) == (422, "Validation")
    assert "have length 1" in answer.json()["error"]


def test_a_long_text_is_refused_unless_it_may_be_cut(http: httpx.Client, vectors: Any) -> None:
    answer = embed(http, ["short", LONG])
    assert refused(answer) == (413, "Validation")
    assert "input 1 has" in answer.json()["error"]
    cut = embed(http, ["short", LONG], truncate=True)
    assert_alike(cut.json(), vectors(["short", LONG]))
    assert cut.headers["halimede-truncated"] == "1"
    left = embed(http, LONG, truncate=True, truncation_direction="Left")
    assert refused(left) == (413, "Validation")


def test_embed_sparse_gives_weights(kinds: Kinds, web: httpx.Client) -> None:
    texts = [text for text in TEXTS if text]
    model = SparseEncoder(str(kinds.folders / "splade"), device="cpu")
    expected = model.encode(texts, convert_to_tensor=True, show_progress_bar=False).to_dense()
    rows = embed(web, texts, "/embed_sparse").json()
    dense = np.zeros(expected.shape, np.float32)
    for place, row in enumerate(rows):
        for weight in row:
            dense[place, weight["index"]] = weight["value"]
    np.testing.assert_allclose(dense, expected.cpu().numpy(), atol=1e-4)
    assert embed(web, texts, "/", model="splade").json() == rows


def test_embed_all_gives_a_vector_for_each_token(kinds: Kinds, web: httpx.Client) -> None:
    with Embedder(kinds.server.grpc_address, "colbert") as embedder:
        expected = embedder.embed_multi(TEXTS, input_type="query").vectors
    rows = embed(web, TEXTS, "/embed_all", prompt_name="query", truncate=True).json()
    for given, vectors_of_text in zip(rows, expected, strict=True):
        np.testing.assert_allclose(given, vectors_of_text, atol=1e-5)
    assert refused(embed(web, "a", "/embed_all", model="unscaled")) == (424, "Backend")


def test_an_answer_has_a_limit(web: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number takes 20 bytes of JSON, and a text may have thousands."""
    monkeypatch.setattr(tei, "MAX_NUMBERS", 100)
    for path in ("/embed_all", "/embed_sparse"):
        assert refused(embed(web, TEXTS, path, truncate=True)) == (413, "Validation")


def test_predict_takes_texts_pairs_and_batches(web: httpx.Client, labels: Any) -> None:
    one, two = "hello world", "An ocelot sleeps."
    assert_labels(embed(web, one, "/predict").json(), labels(one))
    assert_labels(embed(web, [one], "/predict").json(), labels(one))
    assert_labels(embed(web, [one, two], "/predict").json(), labels(one, two))
    batch = embed(web, [[one], [one, two], [two]], "/predict").json()
    for given, expected in zip(batch, [(one,), (one, two), (two,)], strict=True):
        assert_labels(given, labels(*expected))
    assert refused(embed(web, one, "/predict", raw_scores=True)) == (422, "Validation")


def test_similarity_is_of_any_vectors(kinds: Kinds, web: httpx.Client) -> None:
    """Also of vectors of other lengths than 1."""
    model = SentenceTransformer(str(kinds.folders / "unscaled"), device="cpu")
    made = model.encode(TEXTS, show_progress_bar=False)
    expected = torch.nn.functional.cosine_similarity(torch.tensor(made[:1]), torch.tensor(made[1:]))
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}}
    np.testing.assert_allclose(web.post("/similarity", json=body).json(), expected, atol=1e-4)


@pytest.fixture
def tokenizer(settings: Settings) -> Tokenizer:
    [path] = settings.repository.glob(f"{MODEL}-tokenizer/*/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_tokenize_and_decode(http: httpx.Client, tokenizer: Tokenizer, special: bool) -> None:
    """Ids are the tokenizer's; each token's place is in the text's UTF-8. Nothing is cut off."""
    texts = [*TEXTS, LONG]
    answer = embed(http, texts, "/tokenize", add_special_tokens=special).json()
    ids = [[token["id"] for token in row] for row in answer]
    expected = tokenizer.encode_batch(texts, add_special_tokens=special)
    assert ids == [encoding.ids for encoding in expected]
    for text, row in zip(texts, answer, strict=True):
        for token in row:
            assert token["special"] == (token["start"] is None)
            if not token["special"]:
                part = text.encode()[token["start"] : token["stop"]]
                assert part.decode() == token["text"]
    for skip in (True, False):
        body = {"ids": ids, "skip_special_tokens": skip}
        decoded = http.post("/decode", json=body).json()
        assert decoded == tokenizer.decode_batch(ids, skip_special_tokens=skip)
    alone = http.post("/decode", json={"ids": ids[0]}).json()
    assert alone == ["hello world"]


@pytest.mark.parametrize("ids", [[30_522], [2**40], [[101], [10**30]], [], [-1]])
def test_ids_of_no_token_are_refused(http: httpx.Client, ids: Any) -> None:
    assert refused(http.post("/decode", json={"ids": ids}))[0] == 422


def test_a_large_text_is_not_tokenized(http: httpx.Client) -> None:
    assert refused(embed(http, "a " * 200_000, "/tokenize")) == (413, "Validation")


def test_a_tokenizer_that_is_not_here_is_refused(
    kinds: Kinds, web: httpx.Client, server: wheel.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's machine may have another repository than the server, or another build."""
    answer = embed(web, "a", "/tokenize")
    assert refused(answer) == (424, "Backend")
    assert "HALIMEDE_REPOSITORY" in answer.json()["error"]
    monkeypatch.setenv("HALIMEDE_REPOSITORY", str(kinds.repository))
    [prompted] = embed(web, "a", "/tokenize", model="prompted", prompt_name="query").json()
    assert "".join(token["text"] for token in prompted if not token["special"]) == "query:a"
    other = {"clip": triton_model(server)[MODEL]}
    folder = kinds.repository / MODEL
    folder.symlink_to(kinds.repository / "unscaled")
    try:
        with gateway(other, serve_all=False) as address, httpx.Client(base_url=address) as client:
            answer = embed(client, "a", "/tokenize")
            assert refused(answer) == (424, "Backend")
            assert "space" in answer.json()["error"]
    finally:
        folder.unlink()


def test_a_model_of_this_process_has_its_own_tokenizer(kinds: Kinds) -> None:
    models = {"own": {"provider": "onnx", "model_id": "unscaled", "path": str(kinds.repository)}}
    with gateway(models) as address, httpx.Client(base_url=address, timeout=60) as client:
        tokens = embed(client, "hello", "/tokenize").json()
        assert "".join(token["text"] for token in tokens[0][1:-1]) == "hello"
        assert np.shape(embed(client, "hello").json()) == (1, 48)


def test_info_describes_a_model(http: httpx.Client, web: httpx.Client) -> None:
    info = http.get("/info").json()
    assert info["model_id"] == MODEL
    assert info["model_dtype"] == "float32"
    assert info["model_type"] == {"embedding": {"pooling": "unknown"}}
    assert (info["max_input_length"], info["auto_truncate"]) == (256, False)
    assert info["max_client_batch_size"] == 2048
    classifier = web.get("/info", params={"model": "classifier"}).json()["model_type"]["classifier"]
    assert classifier["id2label"]["0"] == "arts"
    reranker = web.get("/info", headers={"halimede-model": "reranker"}).json()
    assert set(reranker["model_type"]) == {"reranker"}
    assert http.get("/health").status_code == 200


def test_without_a_server_it_is_unhealthy() -> None:
    models = {"gone": {"provider": "triton", "model_id": "gone", "url": "127.0.0.1:9"}}
    with gateway(models) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert refused(client.get("/health")) == (503, "Unhealthy")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/embed", {}, 422),
        ("/embed", {"inputs": []}, 422),
        ("/embed", {"inputs": [1]}, 422),
        ("/embed", {"inputs": "a", "model": "none such"}, 404),
        ("/embed", {"inputs": "a", "dimensions": 4000}, 400),
        ("/embed", {"inputs": ["a"] * 3000}, 413),
        ("/embed_sparse", {"inputs": "a"}, 424),
        ("/rerank", {"query": "a", "texts": ["b"]}, 424),
        ("/rerank", {"query": "a", "texts": []}, 422),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422),
        ("/predict", {"inputs": []}, 422),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 422),
        ("/", {}, 422),
    ],
)
def test_a_wrong_body_is_refused_in_words(
    http: httpx.Client, path: str, body: Any, status: int
) -> None:
    assert refused(http.post(path, json=body))[0] == status


# Whatever OpenAPI allows.


@pytest.fixture(scope="module")
def openapi(kinds_address: str) -> Any:
    return schemathesis.openapi.from_url(f"{kinds_address}/openapi.json")


PATHS = [
    *[("GET", path) for path in ("/info", "/health")],
    *[("POST", path) for path in ("/", "/embed", "/embed_all", "/embed_sparse", "/rerank")],
    *[("POST", path) for path in ("/predict", "/similarity", "/tokenize", "/decode")],
    *[("POST", f"/{version}/{path}") for version in ("v1", "v2") for path in ("embed", "rerank")],
]
CHECKS = [not_a_server_error, response_schema_conformance, content_type_conformance]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_whatever_openapi_allows_is_answered_as_it_says(
    openapi: Any, method: str, path: str
) -> None:
    """No request makes the gateway fail, and answers and errors have the shape that is declared."""

    @hypothesis.given(case=openapi[path][method].as_strategy())
    @hypothesis.settings(max_examples=15, derandomize=True, database=None)
    def run(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(checks=CHECKS)
        if answer.status_code >= 400:
            body = json.loads(answer.content)
            assert body.get("message") or body.get("error")

    run()
