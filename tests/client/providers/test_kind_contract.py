"""Rerankers, classifiers, sparse outputs and multi-vectors, from a real Triton by both protocols
and in this process, against the reference library on the same weights.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from conftest import free_options
from sentence_transformers import CrossEncoder, SparseEncoder
from test_cli import halimede

from halimede import (
    AsyncReranker,
    Classifier,
    Embedder,
    InvalidText,
    Reranker,
    UnknownInputType,
    UnsupportedInput,
    maxsim,
)
from halimede_ops import vectors
from halimede_tools.build import describe
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KINDS = ("triton-grpc", "triton-http", "onnx")
MODELS = {
    "reranker": small_models.bert_reranker,
    "topics": small_models.topic_classifier,
    "m3": small_models.like_bge_m3,
    "splade": small_models.like_splade,
    "colbert": small_models.like_pylate,
}
LABELS = ("arts", "sports", "science", 'the "rest"')
PAIRS = corpus.check_pairs()[::8][:50]
TEXTS = [document for _, document in PAIRS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def home(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("kinds")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, source in folders.items():
        build(build_request(str(source), name, precisions=("fp32",)), home)
    return home


@pytest.fixture(scope="module")
def server(home: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, free_options()) as running:
        yield running


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(kind: str, server: wheel.Server, home: Settings) -> dict[str, Any]:
    """The configuration of all models at one provider, with a cache in memory."""
    address = {
        "triton-grpc": {"url": server.grpc_address},
        "triton-http": {"url": f"http://{server.http_address}"},
        "onnx": {"path": str(home.repository)},
    }[kind]
    provider = {"provider": kind.partition("-")[0], "timeout": 180, **address}
    return {"cache": {}, "models": {name: {"model_id": name, **provider} for name in MODELS}}


@pytest.fixture(scope="module")
def reranker(config: dict[str, Any]) -> Iterator[Reranker]:
    with Reranker("reranker", config=config) as opened:
        yield opened


@pytest.fixture(scope="module")
def classifier(config: dict[str, Any]) -> Iterator[Classifier]:
    with Classifier("topics", config=config) as opened:
        yield opened


@pytest.fixture(scope="module")
def embedder(config: dict[str, Any]) -> Iterator[Embedder]:
    with Embedder(model="m3", config=config) as opened:
        yield opened


@pytest.fixture(scope="module")
def cross_encoder(folders: dict[str, Path]) -> CrossEncoder:
    return CrossEncoder(str(folders["reranker"]), device="cpu")


def test_models_say_what_they_are(
    reranker: Reranker, classifier: Classifier, embedder: Embedder
) -> None:
    """Kind, outputs, inputs and labels."""
    models = [client.model for client in (reranker, classifier, embedder)]
    assert [model.kind for model in models] == ["reranker", "classifier", "dense"]
    assert [model.outputs for model in models] == [
        ("scores",),
        ("scores",),
        ("vector", "sparse", "multi"),
    ]
    assert [model.input for model in models] == ["text_pair", "text", "text"]
    assert [model.labels for model in models] == [(), LABELS, ()]
    assert [model.dims for model in models] == [1, 4, 64]


def test_scores_are_those_of_a_cross_encoder(
    reranker: Reranker, cross_encoder: CrossEncoder
) -> None:
    """Within 1e-4 for mixed pairs; tokens are those of both texts; a second call is cached."""
    expected = cross_encoder.predict([list(pair) for pair in PAIRS], show_progress_bar=False)
    result = reranker.score(PAIRS)
    assert np.abs(result.scores - expected).max() <= 1e-4
    whole = cross_encoder.tokenizer(*map(list, zip(*PAIRS, strict=True)), truncation=False)
    assert result.tokens.tolist() == [len(ids) for ids in whole["input_ids"]]
    assert (result.truncated == (result.tokens > 512)).all()
    again = reranker.score(PAIRS)
    assert again.cached.all()
    assert again.scores.tolist() == result.scores.tolist()


def test_ranks_are_those_of_a_cross_encoder(
    reranker: Reranker, cross_encoder: CrossEncoder
) -> None:
    """The order of CrossEncoder.rank, and its scores."""
    documents = corpus.SENTENCES[:40]
    expected = cross_encoder.rank("a city by the sea", documents, top_k=10)
    ranking = reranker.rank("a city by the sea", documents, top_k=10, return_documents=True)
    assert ranking.indices.tolist() == [entry["corpus_id"] for entry in expected]
    assert [entry.document for entry in ranking] == [documents[entry.index] for entry in ranking]
    scores = [entry["score"] for entry in expected]
    np.testing.assert_allclose(ranking.scores, scores, atol=1e-4)


def test_asyncio_ranks_the_same(reranker: Reranker, config: dict[str, Any]) -> None:
    """Several calls at once, by the asyncio class."""

    async def asked() -> list[list[int]]:
        async with AsyncReranker("reranker", config=config) as client:
            calls = [client.rank(query, TEXTS) for query in ("a", "a city")]
            return [ranking.indices.tolist() for ranking in await asyncio.gather(*calls)]

    expected = [reranker.rank(query, TEXTS).indices.tolist() for query in ("a", "a city")]
    assert asyncio.run(asked()) == expected


def test_classes_are_those_of_transformers(
    classifier: Classifier, folders: dict[str, Path]
) -> None:
    """One probability for each label, of texts and of pairs of texts."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(folders["topics"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def probabilities(*texts: str) -> np.ndarray:
        # As a batch of one: a call with a pair of strings takes an empty second text for none.
        batch = [[text] for text in texts]
        inputs = tokenizer(*batch, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            return torch.softmax(model(**inputs).logits[0], -1).numpy()

    result = classifier.classify(TEXTS)
    expected = np.stack([probabilities(text) for text in TEXTS])
    assert np.abs(result.scores - expected).max() <= 1e-4
    assert result.labels == LABELS
    assert result.best == tuple(LABELS[place] for place in expected.argmax(axis=1))
    queries = [query for query, _ in PAIRS]
    of_pairs = classifier.classify(TEXTS[:10], pairs=queries[:10])
    expected = np.stack([probabilities(*pair) for pair in zip(TEXTS[:10], queries, strict=False)])
    assert np.abs(of_pairs.scores - expected).max() <= 1e-4


def test_sparse_outputs_and_multi_vectors_are_bge_m3s(
    embedder: Embedder, folders: dict[str, Path]
) -> None:
    """By their definition on transformers' own hidden states, whatever the batch."""
    folder = folders["m3"]
    model = describe.load(folder, ModelOptions("m3"))
    sparse_head, multi_head = (
        torch.load(folder / file, weights_only=True)
        for file in (describe.SPARSE_FILE, describe.MULTI_VECTOR_FILE)
    )
    special = [model.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<pad>", "<unk>")]
    texts = ["", "again and again and again", *TEXTS[:20]]
    sparse, multi = embedder.embed_sparse(texts), embedder.embed_multi(texts)
    for row, text in enumerate(texts):
        inputs = model.tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            hidden = model[0].auto_model(**inputs).last_hidden_state[0]
        weights = torch.relu(hidden @ sparse_head["weight"].T + sparse_head["bias"])[:, 0]
        expected: dict[int, float] = {}
        for token, weight in zip(inputs["input_ids"][0].tolist(), weights.tolist(), strict=True):
            if token not in special and weight > 0:
                expected[token] = max(expected.get(token, 0.0), weight)
        assert sparse.ids[row].tolist() == sorted(expected)
        np.testing.assert_allclose(
            sparse.weights[row], [expected[token] for token in sorted(expected)], atol=1e-4
        )
        wanted = torch.nn.functional.normalize(
            hidden[1:] @ multi_head["weight"].T + multi_head["bias"], dim=-1
        ).numpy()
        assert multi.vectors[row].shape == wanted.shape
        assert vectors.cosine(multi.vectors[row], wanted).min() >= 0.99999
    assert multi.tokens.tolist() == sparse.tokens.tolist() == embedder.embed(texts).tokens.tolist()
    again = embedder.embed_multi(texts)
    assert again.cached.all()
    assert all(map(np.array_equal, again.vectors, multi.vectors))
    best, _ = maxsim.rank(multi.vectors[1], multi.vectors)
    assert best[0] == 1


def test_sparse_embeddings_are_those_of_a_sparse_encoder(
    config: dict[str, Any], folders: dict[str, Path]
) -> None:
    """SPLADE's ids and weights; the model gives nothing else."""
    expected = SparseEncoder(str(folders["splade"]), device="cpu").encode(
        TEXTS[:20], convert_to_sparse_tensor=False, show_progress_bar=False
    )
    with Embedder(model="splade", config=config) as embedder:
        assert (embedder.model.kind, embedder.model.outputs) == ("sparse", ("sparse",))
        result = embedder.embed_sparse(TEXTS[:20])
        with pytest.raises(UnsupportedInput, match=r"a sparse embedding model.*embed_sparse"):
            embedder.embed(TEXTS)
    for row, dense in enumerate(expected.numpy()):
        found = np.zeros_like(dense)
        found[result.ids[row]] = result.weights[row]
        np.testing.assert_allclose(found, dense, atol=1e-4)


def test_multi_vectors_of_late_interaction_rank_documents(
    config: dict[str, Any], server: wheel.Server
) -> None:
    """Queries and documents have limits of their own. In process they are those of Triton, whose
    model NAME-maxsim is a reranker with the scores of `maxsim`.
    """
    query = "a city by the sea " * 20
    with Embedder(model="colbert", config=config) as embedder:
        model = embedder.model
        assert (model.kind, model.outputs) == ("late_interaction", ("multi",))
        assert 0 < model.query_tokens < model.max_tokens
        documents = embedder.embed_multi(TEXTS, input_type="document")
        asked = embedder.embed_multi(query, input_type="query")
    assert documents.max_tokens == model.max_tokens
    assert (asked.max_tokens, asked.truncated.all()) == (model.query_tokens, True)
    assert asked.vectors[0].shape[1] == model.dims
    scores = maxsim.score(asked.vectors[0], documents.vectors)
    with Reranker("colbert-maxsim", url=server.grpc_address, timeout_s=180) as reranker:
        served = reranker.score([(query, text) for text in TEXTS])
    np.testing.assert_allclose(served.scores, scores, rtol=1e-4, atol=1e-4)


def test_what_a_model_does_not_give_is_refused(
    reranker: Reranker, classifier: Classifier, config: dict[str, Any]
) -> None:
    """By every provider alike, in words that say what it is and what to call."""
    with Embedder(model="reranker", config=config) as embedder:
        for call in (
            lambda: embedder.embed("a"),
            lambda: embedder.embed_sparse("a"),
            lambda: embedder.embed_multi("a"),
            lambda: embedder.embed_images([b"x"]),
        ):
            with pytest.raises(UnsupportedInput, match=r"is a reranker.*all Reranker\.rank or"):
                call()
    with Classifier("m3", config=config) as client:
        with pytest.raises(UnsupportedInput, match=r"dense embedding model; classify needs.*embed"):
            client.classify("a")
    with Embedder(model="topics", config=config) as embedder:
        with pytest.raises(UnsupportedInput, match=r"is a classifier.*Classifier\.classify"):
            embedder.embed_images([b"x"])


def test_errors_name_their_input(reranker: Reranker, embedder: Embedder) -> None:
    """An input type that is none, and a text that is too long, of a pair as of a text."""
    with pytest.raises(UnknownInputType):
        embedder.embed_multi(["a"], input_type="s3cret")
    with pytest.raises(InvalidText, match="text 1"):
        reranker.score([("a", "b"), ("a", "b " * 3_000_000)])


def test_no_documents_give_no_rows(
    reranker: Reranker, classifier: Classifier, embedder: Embedder
) -> None:
    """Arrays of no rows and the right width."""
    assert reranker.rank("a", []).scores.shape == (0,)
    assert classifier.classify([]).scores.shape == (0, 4)
    assert embedder.embed_sparse([]).ids == embedder.embed_multi([]).vectors == ()


def test_the_command_ranks_and_classifies(server: wheel.Server, reranker: Reranker) -> None:
    """`halimede rerank` and `classify` print what the classes give, as JSON and for people."""
    texts = ["a city by the sea", "a red fox", "bread and wine"]
    command = ["rerank", "the sea", *texts, "--model", "reranker"]
    answer = json.loads(halimede(*command, "--json", "--top-k", "2", server=server).stdout)
    expected = reranker.rank("the sea", texts, top_k=2)
    assert [row["index"] for row in answer["ranking"]] == expected.indices.tolist()
    assert [row["text"] for row in answer["ranking"]] == [texts[i] for i in expected.indices]
    assert (answer["model"], answer["precision"]) == ("reranker", "fp32")
    lines = halimede(*command, server=server).stdout.decode().splitlines()
    assert len(lines) == 4
    assert lines[1].endswith(texts[expected.indices[0]])
    command = ["classify", *texts, "--model", "topics"]
    answer = json.loads(halimede(*command, "--json", server=server).stdout)
    assert tuple(answer["labels"]) == LABELS
    assert [len(row["scores"]) for row in answer["classes"]] == [4] * 3
    lines = halimede(*command, server=server).stdout.decode().splitlines()
    assert [line.rsplit("  ", 1)[1] for line in lines[1:]] == [
        row["label"] for row in answer["classes"]
    ]


def test_the_command_embeds_further_outputs(server: wheel.Server, tmp_path: Path) -> None:
    """`halimede embed --sparse` and `--multi`; options of single vectors are refused."""
    command = ["embed", "a city by the sea", "b", "--model", "m3"]
    rows = json.loads(halimede(*command, "--sparse", "--json", server=server).stdout)["embeddings"]
    assert [len(row["ids"]) == len(row["weights"]) for row in rows] == [True, True]
    rows = json.loads(halimede(*command, "--multi", "--json", server=server).stdout)["embeddings"]
    assert [len(row["vectors"]) == row["tokens"] - 1 for row in rows] == [True, True]
    assert b"\xc3\x97 64" in halimede(*command, "--multi", server=server).stdout
    assert halimede(*command, "--sparse", server=server).stdout.count(b"[") == 2
    for wrong in (["--multi"], ["--dimensions", "8"], ["--npy", str(tmp_path / "v.npy")]):
        done = halimede(*command, "--sparse", *wrong, server=server)
        assert (done.returncode, done.stderr[:7]) == (1, b"error: ")


def test_the_command_says_what_models_are(server: wheel.Server) -> None:
    """`halimede models` has a column for the kind; another verb names the verb to use."""
    rows = json.loads(halimede("models", "--json", server=server).stdout)
    assert {row["name"]: (row["kind"], row["input"]) for row in rows} == {
        "reranker": ("reranker", "text pair"),
        "topics": ("classifier", "text"),
        "m3": ("dense", "text"),
        "splade": ("sparse", "text"),
        "colbert": ("late_interaction", "text"),
        "colbert-maxsim": ("reranker", "text pair"),
        "m3-maxsim": ("reranker", "text pair"),
    }
    done = halimede("embed", "a", "--model", "reranker", server=server)
    assert done.returncode == 1
    assert b"is a reranker; embed needs a dense model" in done.stderr
    assert b"Traceback" not in done.stderr
