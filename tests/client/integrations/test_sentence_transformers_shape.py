"""sentence-transformers' shape, beside the real classes with the same weights."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL
from gateways import Kinds
from sentence_transformers import CrossEncoder, SentenceTransformer, SimilarityFunction

from halimede import (
    Embedder,
    InvalidConfig,
    InvalidInput,
    InvalidText,
    Reranker,
    UnknownInputType,
    UnsupportedInput,
    as_sentence_transformer,
)
from halimede.integrations.sentence_transformers import (
    CrossEncoderAdapter,
    SentenceTransformerAdapter,
)
from halimede.testing import FakeProvider
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TEXTS = ["hello world", "What is Triton?", "An ocelot sleeps in the rain.", "naïve 🦊 中文", ""]
QUERY = "which bird swims?"
DOCUMENTS = ["Penguins swim.", "Wool socks keep feet warm.", "The museum opens at nine."]
LOWEST = 0.99999
"""Lowest cosine to sentence-transformers in FP32."""


def lowest_cosine(a: Any, b: Any) -> float:
    a, b = (np.atleast_2d(np.asarray(value, np.float64)) for value in (a, b))
    assert a.shape == b.shape
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())


@pytest.fixture(scope="module")
def real(source: Path) -> SentenceTransformer:
    return SentenceTransformer(str(source), device="cpu")


@pytest.fixture(scope="module", params=["triton", "in process"])
def ours(
    request: pytest.FixtureRequest, settings: Settings
) -> Iterator[SentenceTransformerAdapter]:
    """The default model in FP32, on a real Triton and in this process."""
    if request.param == "triton":
        server: wheel.Server = request.getfixturevalue("server")
        arguments: dict[str, Any] = {"url": server.grpc_address}
    else:
        options = {"provider": "onnx", "model_id": MODEL, "path": str(settings.repository)}
        arguments = {"config": {"models": {MODEL: options}}}
    with as_sentence_transformer(MODEL, **arguments) as model:
        yield model


@pytest.fixture
def fake() -> SentenceTransformerAdapter:
    return as_sentence_transformer(Embedder(providers=[FakeProvider()]))


@pytest.mark.parametrize(
    ("adapter", "theirs", "method"),
    [
        (SentenceTransformerAdapter, SentenceTransformer, "encode"),
        (SentenceTransformerAdapter, SentenceTransformer, "encode_query"),
        (SentenceTransformerAdapter, SentenceTransformer, "encode_document"),
        (SentenceTransformerAdapter, SentenceTransformer, "truncate_embeddings"),
        (SentenceTransformerAdapter, SentenceTransformer, "start_multi_process_pool"),
        (CrossEncoderAdapter, CrossEncoder, "predict"),
        (CrossEncoderAdapter, CrossEncoder, "rank"),
    ],
)
def test_every_parameter_of_theirs_is_accepted(adapter: type, theirs: type, method: str) -> None:
    """By position and by name, with the same defaults."""
    expected = inspect.signature(getattr(theirs, method)).parameters
    own = inspect.signature(getattr(adapter, method))
    named = [
        name
        for name, one in expected.items()
        if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    own.bind(*named)
    own.bind("self", **dict.fromkeys(named[1:]))
    for name in named[1:]:
        if name in own.parameters:
            assert own.parameters[name].default == expected[name].default


CALLS: dict[str, dict[str, Any]] = {
    "a list": {},
    "normalised": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 100},
    "truncated and normalised": {"truncate_dim": 100, "normalize_embeddings": True},
    "as a tensor": {"convert_to_tensor": True, "device": "cpu"},
    "in batches": {"batch_size": 2, "show_progress_bar": False},
    "as bits": {"precision": "ubinary"},
    "as signed bits": {"precision": "binary", "convert_to_tensor": True},
    "as bytes": {"precision": "uint8"},
    "as signed bytes": {"precision": "int8"},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_encode_gives_their_vectors(
    ours: SentenceTransformerAdapter, real: SentenceTransformer, options: dict[str, Any]
) -> None:
    """Of the same type, shape, dtype and length; a byte may differ by 1 where a float is rounded."""
    given, expected = ours.encode(TEXTS, **options), real.encode(TEXTS, **options)
    assert (type(given), given.dtype) == (type(expected), expected.dtype)
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape
    if "precision" not in options:
        assert lowest_cosine(given, expected) >= LOWEST
        np.testing.assert_allclose(
            np.linalg.norm(given, axis=1), np.linalg.norm(expected, axis=1), atol=1e-4
        )
    elif "int8" in options["precision"]:
        assert np.abs(given.astype(int) - expected.astype(int)).max() <= 1
    else:
        bits = np.unpackbits(given.view(np.uint8)) != np.unpackbits(expected.view(np.uint8))
        assert bits.mean() < 0.001


def test_single_texts_and_lists_of_tensors(
    ours: SentenceTransformerAdapter, real: SentenceTransformer
) -> None:
    """A string has a vector of one dimension, and other collections of texts are lists."""
    given, expected = ours.encode(TEXTS[0]), real.encode(TEXTS[0])
    assert given.shape == expected.shape == (384,)
    assert lowest_cosine(given, expected) >= LOWEST
    assert ours.encode(np.array(TEXTS[:2])).shape == (2, 384)
    assert ours.encode(tuple(TEXTS[:2])).shape == (2, 384)
    assert len(ours.encode([])) == len(real.encode([])) == 0
    rows = ours.encode(TEXTS[:2], convert_to_numpy=False)
    assert [type(row) for row in rows] == [torch.Tensor] * 2
    assert ours.encode(sentences=TEXTS[:1]).shape == (1, 384)


def test_similarities_are_theirs(
    ours: SentenceTransformerAdapter, real: SentenceTransformer
) -> None:
    """For each name, of matrices and of single vectors, as a tensor."""
    vectors = real.encode(TEXTS)
    for name in ("cosine", "dot", "euclidean", "manhattan", SimilarityFunction.COSINE):
        ours.similarity_fn_name = real.similarity_fn_name = name
        assert ours.similarity_fn_name == real.similarity_fn_name
        for a, b in ((vectors, vectors[:2]), (vectors[0], vectors), (torch.tensor(vectors),) * 2):
            given, expected = ours.similarity(a, b), real.similarity(a, b)
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
        given = ours.similarity_pairwise(vectors[:2], vectors[2:4])
        torch.testing.assert_close(
            given, real.similarity_pairwise(vectors[:2], vectors[2:4]), atol=1e-4, rtol=1e-4
        )


def test_facts_are_theirs(ours: SentenceTransformerAdapter, real: SentenceTransformer) -> None:
    """Token limit and dimensions, also within `truncate_embeddings`."""
    assert ours.max_seq_length == real.max_seq_length == ours.get_max_seq_length()
    assert ours.get_embedding_dimension() == real.get_embedding_dimension()
    with ours.truncate_embeddings(64), real.truncate_embeddings(64):
        assert ours.get_sentence_embedding_dimension() == real.get_embedding_dimension() == 64
        assert lowest_cosine(ours.encode(TEXTS), real.encode(TEXTS)) >= LOWEST
    assert ours.get_embedding_dimension() == 384
    assert ours.model_card_data.model_name == MODEL
    assert ours.to("cpu").eval() is ours


def test_prompts_are_the_models(kinds: Kinds) -> None:
    """Queries, documents and named prompts have the vectors of a model with prompts.

    Documents have the prompt `passage` of a folder whose `document` is empty, as everywhere here.
    """
    real = SentenceTransformer(str(kinds.folders / "prompted"), device="cpu")
    with as_sentence_transformer("prompted", url=kinds.server.grpc_address) as ours:
        pairs = [
            (ours.encode_query(TEXTS), real.encode_query(TEXTS)),
            (ours.encode_document(TEXTS), real.encode(TEXTS, prompt_name="passage")),
            (ours.encode(TEXTS), real.encode(TEXTS)),
            (ours.encode(TEXTS, "query"), real.encode(TEXTS, prompt_name="query")),
        ]
        assert [lowest_cosine(*pair) >= LOWEST for pair in pairs] == [True] * 4
        assert lowest_cosine(pairs[0][0], pairs[1][0]) < LOWEST
        with pytest.raises(UnknownInputType):
            ours.encode(TEXTS, prompt_name="nothing")


def test_lengths_are_the_models(kinds: Kinds) -> None:
    """A model that does not normalise gives vectors of its own lengths."""
    real = SentenceTransformer(str(kinds.folders / "unscaled"), device="cpu")
    with as_sentence_transformer("unscaled", url=kinds.server.grpc_address) as ours:
        for options in ({}, {"normalize_embeddings": True}, {"truncate_dim": 8}):
            given, expected = ours.encode(TEXTS, **options), real.encode(TEXTS, **options)
            np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "query: "}, "prompt_name"),
        ({"prompt": ""}, "prompt_name"),
        ({"output_value": "token_embeddings"}, "embed_multi"),
        ({"output_value": None}, "sentence_embedding"),
        ({"task": "query"}, "task"),
        ({"processing_kwargs": {}}, "processing_kwargs"),
    ],
)
def test_what_a_server_does_not_give_is_refused(
    fake: SentenceTransformerAdapter, options: dict[str, Any], message: str
) -> None:
    """An error says so; there is never another vector."""
    with pytest.raises(UnsupportedInput, match=message):
        fake.encode(TEXTS, **options)


def test_invalid_arguments_are_refused(fake: SentenceTransformerAdapter) -> None:
    """With errors of halimede's, which are ValueErrors as sentence-transformers' are."""
    for options in ({"precision": "float16"}, {"batch_size": 0}, {"truncate_dim": 0}):
        with pytest.raises(InvalidInput):
            fake.encode(TEXTS, **options)
    with pytest.raises(InvalidText):
        fake.encode([("a", "pair")])
    with pytest.raises(UnsupportedInput, match="embed_images"):
        fake.encode({"text": "a"})
    with pytest.raises(UnsupportedInput, match="float16"):
        fake.to(torch.float16)
    with pytest.raises(InvalidInput, match="manhattan"):
        fake.similarity_fn_name = "angle"
    with pytest.raises(UnsupportedInput, match="512"):
        fake.max_seq_length = 128
    fake.max_seq_length = 512
    with pytest.raises(InvalidConfig, match="url"):
        as_sentence_transformer(Embedder(providers=[FakeProvider()]), url="127.0.0.1:1")


@pytest.fixture(scope="module")
def reranker(kinds: Kinds) -> Iterator[CrossEncoderAdapter]:
    with as_sentence_transformer(Reranker("reranker", url=kinds.server.grpc_address)) as model:
        yield model


def test_a_reranker_is_a_cross_encoder(reranker: CrossEncoderAdapter, kinds: Kinds) -> None:
    """`predict` and `rank` give their scores, types and order."""
    real = CrossEncoder(str(kinds.folders / "reranker"), device="cpu")
    pairs = [(QUERY, document) for document in DOCUMENTS]
    given, expected = reranker.predict(pairs), real.predict(pairs)
    assert (type(given), given.dtype, given.shape) == (np.ndarray, expected.dtype, (3,))
    np.testing.assert_allclose(given, expected, atol=1e-4)
    single = reranker.predict(pairs[0])
    assert np.ndim(single) == np.ndim(real.predict(pairs[0])) == 0
    assert reranker.predict([list(pair) for pair in pairs], convert_to_tensor=True).shape == (3,)
    ours = reranker.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
    theirs = real.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert [row["corpus_id"] for row in ours] == [row["corpus_id"] for row in theirs]
    assert [row["text"] for row in ours] == [row["text"] for row in theirs]
    assert (reranker.num_labels, reranker.max_length) == (real.num_labels, real.max_seq_length)


@pytest.mark.parametrize(
    "options",
    [{"activation_fn": torch.nn.Sigmoid()}, {"apply_softmax": True}, {"prompt": "x"}],
    ids=str,
)
def test_a_cross_encoders_prompts_and_activations_are_refused(options: dict[str, Any]) -> None:
    """The server applies its own."""
    model = as_sentence_transformer(Reranker(providers=[FakeProvider(kind="reranker")]))
    with pytest.raises(UnsupportedInput):
        model.rank(QUERY, DOCUMENTS, **options)


def test_arrays_need_no_torch() -> None:
    """Encoding imports neither torch nor sentence-transformers."""
    code = (
        "import sys, halimede; from halimede.testing import FakeProvider; "
        "client = halimede.Embedder(providers=[FakeProvider()]); "
        "halimede.as_sentence_transformer(client).encode_query(['a']); "
        "assert not {'torch', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
