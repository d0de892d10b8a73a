"""Cohere's dialect, by Cohere's own SDK in both versions."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import cohere
import httpx
import numpy as np
import pytest
from conftest import MODEL
from gateways import Kinds, assert_alike, gateway, triton_model
from PIL import Image
from sentence_transformers.util.quantization import quantize_embeddings

from halimede import Embedder
from halimede_tools.serve import wheel

TEXTS = ["hello world", "What is Triton?", "a", "An ocelot sleeps in the rain. " * 3]
LONG = "An ocelot sleeps in the rain. " * 60
TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]


def client_v2(address: str) -> cohere.ClientV2:
    return cohere.ClientV2(api_key="any", base_url=address)


@pytest.fixture
def client(address: str) -> cohere.ClientV2:
    return client_v2(address)


@pytest.fixture
def client_v1(address: str) -> cohere.Client:
    return cohere.Client(api_key="any", base_url=address)


def embed(client: cohere.ClientV2, texts: list[str] = TEXTS, **options: Any) -> Any:
    options = {"model": MODEL, "input_type": "search_document", **options}
    return client.embed(texts=texts, **options)


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_uri(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def test_all_types_are_of_the_same_vectors(client: cohere.ClientV2, vectors: Any) -> None:
    """Each type is what sentence-transformers makes of the floats, in one fixed range."""
    answer = embed(client, embedding_types=TYPES)
    floats = np.array(answer.embeddings.float_, np.float32)
    assert_alike(floats, vectors(TEXTS))
    dims = floats.shape[1]
    ranges = np.array([[-4 / dims**0.5], [4 / dims**0.5]], np.float32).repeat(dims, axis=1)
    for name in ("int8", "uint8", "binary", "ubinary"):
        expected = quantize_embeddings(floats, name, ranges=ranges)
        np.testing.assert_array_equal(getattr(answer.embeddings, name), expected)
    read = [np.frombuffer(base64.b64decode(row), "<f4") for row in answer.embeddings.base64]
    np.testing.assert_array_equal(read, floats)
    assert answer.response_type == "embeddings_by_type"
    assert answer.texts == TEXTS
    assert answer.meta.api_version.version == "2"
    assert answer.meta.billed_units.input_tokens > len(TEXTS)
    assert answer.meta.warnings is None


def test_int8_of_two_requests_can_be_compared(client: cohere.ClientV2) -> None:
    """A text's int8 vector does not depend on the other texts of the request."""
    together = embed(client, embedding_types=["int8"]).embeddings.int8
    alone = [embed(client, [text], embedding_types=["int8"]).embeddings.int8[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1)  # a batch may round the last bit otherwise


def test_int8_range_is_configured(server: wheel.Server) -> None:
    with gateway(triton_model(server), int8_range=0.01) as address:
        answer = embed(client_v2(address), embedding_types=["int8"])
    assert set(np.abs(np.ravel(answer.embeddings.int8))) >= {127, 128}


def test_floats_are_the_default_type(client: cohere.ClientV2, vectors: Any) -> None:
    answer = embed(client, output_dimension=128)
    cut = vectors(TEXTS)[:, :128]
    assert_alike(answer.embeddings.float_, cut)
    assert answer.embeddings.int8 is None


def test_v1_without_types_answers_a_plain_list(client_v1: cohere.Client, vectors: Any) -> None:
    """The SDK sends 96 texts in each request, and puts the answers together."""
    texts = [f"{text} {n}" for n in range(50) for text in TEXTS]
    answer = client_v1.embed(texts=texts, model=MODEL, input_type="search_query")
    assert answer.response_type == "embeddings_floats"
    assert answer.texts == texts
    assert_alike(answer.embeddings, vectors(texts))


def test_v1_with_types_answers_by_type(client_v1: cohere.Client, vectors: Any) -> None:
    answer = client_v1.embed(texts=TEXTS, embedding_types=["float", "ubinary"])
    assert answer.response_type == "embeddings_by_type"
    assert_alike(answer.embeddings.float_, vectors(TEXTS))
    assert np.shape(answer.embeddings.ubinary) == (len(TEXTS), 48)
    assert answer.meta.api_version.version == "1"


def test_a_cut_text_is_told(client: cohere.ClientV2) -> None:
    answer = embed(client, [LONG, "short"])
    assert answer.meta.warnings == [
        "1 text was cut off: all-MiniLM-L6-v2 reads 256 tokens of a text."
    ]


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["short", LONG], {"truncate": "NONE"}, "input 1 has"),
        (["short", LONG], {"truncate": "START"}, "at their end alone"),
        (TEXTS, {"max_tokens": 5}, "max_tokens is 5"),
        (TEXTS, {"output_dimension": 4000}, "dimensions"),
    ],
)
def test_what_cannot_be_had_is_refused(
    client: cohere.ClientV2, texts: list[str], options: Any, words: str
) -> None:
    with pytest.raises(cohere.BadRequestError) as refused:
        embed(client, texts, **options)
    assert words in refused.value.body["message"]


def test_an_unknown_model_is_not_found(client: cohere.ClientV2) -> None:
    with pytest.raises(cohere.NotFoundError) as refused:
        embed(client, model="embed-v4.0")
    assert "no model of this name" in refused.value.body["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"texts": []},
        {"texts": ["a"], "images": ["data:image/png;base64,AA=="]},
        {"texts": ["a"], "embedding_types": ["int4"]},
        {"texts": ["\ud800"]},
        {"inputs": [{"content": [{"type": "text"}]}]},
        {"inputs": [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"images": ["https://example.com/cat.png"]},
        {"images": ["data:image/png;base64,?"]},
    ],
)
def test_a_wrong_body_is_refused_in_words(http: httpx.Client, body: Any) -> None:
    answer = http.post("/v2/embed", content=json.dumps(body))
    assert answer.status_code in (400, 422)
    assert answer.json()["message"]


def test_images_and_inputs_have_the_model_s_vectors(kinds: Kinds, kinds_address: str) -> None:
    """Images alone, and texts and images in one request, each in its place."""
    files = [picture("red"), picture("teal", (64, 64))]
    client = client_v2(kinds_address)
    with Embedder(kinds.server.grpc_address, "clip") as embedder:
        images = embedder.embed_images(files).vectors
        texts = embedder.embed(["a red square", "a cat"]).vectors
    uris = [data_uri(file) for file in files]
    seen = client.embed(model="clip", images=uris, input_type="image")
    np.testing.assert_allclose(seen.embeddings.float_, images, atol=1e-5)
    assert seen.images is not None
    assert (seen.images[0].width, seen.images[0].height, seen.images[0].format) == (40, 30, "png")
    assert seen.meta.billed_units.images == 2
    inputs: Any = [
        {"content": [{"type": "image_url", "image_url": {"url": uris[0]}}]},
        {"content": [{"type": "text", "text": "a red square"}]},
        {"content": [{"type": "image_url", "image_url": {"url": uris[1]}}]},
        {"content": [{"type": "text", "text": "a cat"}]},
    ]
    mixed = client.embed(model="clip", inputs=inputs, input_type="search_document")
    expected = np.stack([images[0], texts[0], images[1], texts[1]])
    np.testing.assert_allclose(mixed.embeddings.float_, expected, atol=1e-5)


def test_a_text_with_its_image_has_one_vector(kinds: Kinds, kinds_address: str) -> None:
    """Of a fusion; other models refuse it."""
    file, text = picture("red"), "a red square"
    parts: Any = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_uri(file)}},
    ]
    inputs: Any = [{"content": parts}, {"content": parts[:1]}, {"content": parts[1:]}]
    client = client_v2(kinds_address)
    answer = client.embed(model="fused", inputs=inputs, input_type="classification")
    with Embedder(kinds.server.grpc_address, "fused") as embedder:
        expected = embedder.embed_multimodal([text, text, None], [file, None, file]).vectors
    np.testing.assert_allclose(answer.embeddings.float_, expected, atol=1e-5)
    with pytest.raises(cohere.BadRequestError) as refused:
        client.embed(model="clip", inputs=inputs, input_type="classification")
    assert "clip" in refused.value.body["message"]


@pytest.mark.parametrize("role", ["query", "document"])
def test_input_types_have_the_model_s_prompts(kinds: Kinds, kinds_address: str, role: str) -> None:
    with Embedder(kinds.server.grpc_address, "prompted") as embedder:
        expected = embedder.embed(TEXTS, input_type=role).vectors
    answer = embed(client_v2(kinds_address), model="prompted", input_type=f"search_{role}")
    np.testing.assert_allclose(answer.embeddings.float_, expected, atol=1e-5)


def test_a_model_of_texts_refuses_images(client: cohere.ClientV2) -> None:
    with pytest.raises(cohere.BadRequestError):
        client.embed(model=MODEL, images=[data_uri(picture("red"))], input_type="image")
