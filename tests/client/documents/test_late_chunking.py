"""Late chunking: the vector of a span is the mean of the reference's token embeddings."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import late_models
import numpy as np
import pytest
import small_models
from conftest import free_options
from gateways import assert_alike, gateway
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as strategies
from sentence_transformers import SentenceTransformer
from test_chunking import PROSE, model_tokenizer
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from halimede import AsyncEmbedder, Embedder
from halimede.documents import tokenizers
from halimede.documents.late import Window, Windower
from halimede.documents.parts import joined
from halimede_ops import errors, vectors
from halimede_tools.build.plan import build, build_request
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

COSINE = 0.99999
TEXTS = strategies.lists(
    strategies.one_of(
        strategies.text(max_size=12),
        strategies.sampled_from(
            ["[SEP]", " ", "今天天气", "👩‍👩‍👧‍👦", "é ", "\r\n", PROSE, "word word "]
        ),
    ),
    max_size=12,
).map("".join)


class Built:
    """The models of `late_models`, built into one repository, with embedders in this process."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(home=folder / "home", repository=folder / "repository")
        self.sources = {name: make(folder / name) for name, make in late_models.MODELS.items()}
        for name, source in self.sources.items():
            more: Any = {"precisions": ("fp32",), "late_chunking": True}
            if name == "bert":
                more |= {"precisions": ("fp32", "fp16", "int8"), "matryoshka": (32,)}
                more |= {"accepted": ("fp16", "int8")}  # of random weights, they miss their bars
            build(build_request(str(source), name, **more), self.settings)
        self.references = {
            name: SentenceTransformer(str(source), device="cpu")
            for name, source in self.sources.items()
        }

    def config(self, name: str) -> dict[str, Any]:
        path = str(self.settings.repository)
        return {"models": {name: {"provider": "onnx", "model_id": name, "path": path}}}

    def windows(self, embedder: Embedder, text: str, overlap: int | None = None) -> list[Window]:
        folder = tokenizers.folder_of(embedder.config.chain()[0], embedder.model)
        return list(Windower(tokenizers.read(folder), overlap, "document")(text))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("late"))


@pytest.fixture(scope="module")
def embedders(built: Built) -> Iterator[dict[str, Embedder]]:
    opened = {name: Embedder(config=built.config(name)) for name in late_models.MODELS}
    yield opened
    for embedder in opened.values():
        embedder.close()


def check(built: Built, embedder: Embedder, name: str, text: str, spans: Any, overlap: Any) -> None:
    """The vectors of spans are those of the reference; a span without a token is refused."""
    prompt = built.references[name].prompts.get("document") or ""
    windows = built.windows(embedder, text, overlap)
    expected = late_models.pooled(built.references[name], text, spans, windows, prompt)
    ask = {"spans": [spans], "late": True, "window_overlap": overlap}
    if np.isnan(expected).any():
        with pytest.raises(errors.InvalidText, match="^text 0 has no token from character"):
            embedder.embed_documents(text, **ask)
        return
    result = embedder.embed_documents(text, **ask)
    assert result.spans.tolist() == [list(span) for span in spans]
    assert vectors.cosine(result.vectors, expected).min() >= COSINE
    lengths = np.linalg.norm(expected, axis=1) / np.linalg.norm(result.vectors, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-3)


@examples(max_examples=25)
@given(TEXTS, strategies.data())
def test_any_span_of_any_text(
    built: Built, embedders: dict[str, Embedder], text: str, data: strategies.DataObject
) -> None:
    """Whatever the text, its spans and the overlap of windows, in every kind of model."""
    assume(text)
    index = strategies.integers(0, len(text))
    pairs = strategies.tuples(index, index).filter(lambda pair: pair[0] != pair[1])
    spans = [tuple(sorted(pair)) for pair in data.draw(strategies.lists(pairs, min_size=1))]
    overlap = data.draw(strategies.sampled_from([None, 0, 1, 7, 20]))
    for name, embedder in embedders.items():
        check(built, embedder, name, text, spans, overlap)


@pytest.mark.parametrize("name", late_models.MODELS)
@pytest.mark.parametrize("overlap", [None, 0, 16])
def test_spans_across_windows(
    built: Built, embedders: dict[str, Embedder], name: str, overlap: int | None
) -> None:
    """A document of many windows: short spans, spans over several windows, and all of it."""
    text = PROSE * 40
    spans = [
        (start, min(len(text), start + size))
        for size in (30, 700)
        for start in range(0, len(text), 400)
    ]
    assert len(built.windows(embedders[name], text, overlap)) > 2
    check(built, embedders[name], name, text, [*spans, (0, len(text))], overlap)


@examples(max_examples=40)
@given(
    TEXTS.map(lambda text: text * 8),
    strategies.sampled_from([None, 0, 1, 9, 15]),
)
def test_windows_are_the_text(text: str, overlap: int | None) -> None:
    """Each character is taken from one window, which holds it and which the model takes whole."""
    for kind in ("wordpiece", "unigram", "roberta", "qwen", "gemma"):
        own = model_tokenizer(kind, "text: ", 40)
        windows = list(Windower(own, overlap, "document")(text))
        ends = [window.behind for window in windows]
        assert [window.first for window in windows] == [0, *ends[:-1]]
        assert ends[-1] == len(text)
        for window in windows:
            if window.first < window.behind:
                assert window.start <= window.first < window.behind <= window.end
        read = [text[window.start : window.end] for window in windows]
        counts = own.reader.encode(read, ["document"] * len(read))
        assert max(tokens.total for tokens in counts) <= 40


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "roberta", "qwen", "gemma"])
def test_windows_have_the_tokens_of_the_text(kind: str) -> None:
    """A window is cut where no token changes, and each token has context on both sides."""
    own, text = model_tokenizer(kind, max_tokens=64), PROSE * 30
    encoding = own.tokenizer.encode(text, add_special_tokens=False)
    by_start = list(zip(encoding.offsets, encoding.ids, strict=True))
    for window in list(Windower(own, 20, "document")(text)):
        part = own.tokenizer.encode(text[window.start : window.end], add_special_tokens=False)
        shifted = [
            ((begin + window.start, end + window.start), token)
            for (begin, end), token in zip(part.offsets, part.ids, strict=True)
        ]
        assert set(shifted[1:-1]) <= set(by_start)
        before = sum(end <= window.first for (_, end), _ in shifted)
        after = sum(begin >= window.behind for (begin, _), _ in shifted)
        assert before >= 8 or window.start == 0
        assert after >= 8 or window.end == len(text)


def test_chunks_of_documents(built: Built, embedders: dict[str, Embedder]) -> None:
    """Chunks, dimensions, output types and tokens are as without late chunking; vectors are not."""
    documents = [PROSE * 20, "A short one.", PROSE]
    embedder = embedders["bert"]
    plain = embedder.embed_documents(documents, tokens=40, overlap=8)
    late = embedder.embed_documents(documents, tokens=40, overlap=8, late=True)
    assert late.spans.tolist() == plain.spans.tolist()
    assert late.documents.tolist() == plain.documents.tolist()
    assert late.tokens.tolist() == plain.tokens.tolist()
    assert (late.space, late.precision, late.dims) == (plain.space, plain.precision, 64)
    assert np.allclose(np.linalg.norm(late.vectors, axis=1), 1, atol=1e-5)
    assert vectors.cosine(late.vectors, plain.vectors).min() < 0.99
    short = embedder.embed_documents(documents, tokens=40, overlap=8, late=True, dimensions=32)
    cut = vectors.normalise(late.vectors[:, :32])
    assert vectors.cosine(short.vectors, cut).min() >= COSINE
    bits = embedder.embed_documents(
        documents, tokens=40, overlap=8, late=True, output_type="ubinary"
    )
    assert (bits.vectors == np.packbits(late.vectors > 0, axis=1)).all()

    async def ask() -> np.ndarray:
        async with AsyncEmbedder(config=built.config("bert")) as client:
            result = await client.embed_documents(documents, tokens=40, overlap=8, late=True)
            return result.vectors

    assert vectors.cosine(asyncio.run(ask()), late.vectors).min() >= COSINE


@pytest.mark.parametrize("late", [False, True])
def test_an_error_names_its_document(embedders: dict[str, Embedder], late: bool) -> None:
    """An error about a chunk has the index of its document. White space has a vector only alone."""
    documents = [PROSE * 9, PROSE, " \n", "b"]
    with pytest.raises(errors.InvalidInput) as refused:
        embedders["bert"].embed_documents(documents, late=late, spans=[[], [], [(0, 9)], []])
    assert refused.value.index == 2
    if late:
        with pytest.raises(errors.InvalidText, match="^text 2 has no token") as empty:
            embedders["bert"].embed_documents(documents, late=late)
        assert empty.value.index == 2
    else:
        result = embedders["bert"].embed_documents(documents, tokens=40)
        assert set(result.documents) == {0, 1, 2, 3}
    huge = "a" * (4 * 2**20 + 1)
    with pytest.raises(errors.InvalidText, match="has 4,194,305 bytes") as large:
        spans = [[(0, 9)], [(0, len(huge))]]
        embedders["bert"].embed_documents([PROSE, huge], spans=spans)
    assert large.value.index == 1


@pytest.mark.parametrize(("precision", "cosine"), [("fp16", 0.9999), ("int8", 0.98)])
def test_other_precisions(
    built: Built, embedders: dict[str, Embedder], precision: str, cosine: float
) -> None:
    """FP16 and INT8 give the vectors of FP32, as closely as those of whole texts."""
    with Embedder(config=built.config(f"bert-{precision}")) as embedder:
        given = embedder.embed_documents(PROSE * 20, tokens=40, late=True)
    whole = embedders["bert"].embed_documents(PROSE * 20, tokens=40, late=True)
    assert given.precision == precision
    assert vectors.cosine(given.vectors, whole.vectors).min() >= cosine


MEASURED = """
import resource, sys
from halimede import Embedder
config = {"models": {"m": {"provider": "onnx", "model_id": sys.argv[1], "path": sys.argv[2]}}}
text = "The river is long and it was 3.5 m deep, said Dr. Smith. " * int(sys.argv[3])
with Embedder(config=config) as embedder:
    result = embedder.embed_documents(text, tokens=64, late=True)
    assert result.spans[-1, 1] > len(text) - 2
print(len(result), int(result.tokens.sum()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_document_of_100_000_tokens_in_bounded_memory(built: Built) -> None:
    """Ten times the document takes less than 64 MB more: its token embeddings alone take 256 B a
    token here, and are never held together.
    """

    def run(times: int) -> tuple[int, int, int]:
        command = [sys.executable, "-c", MEASURED, "modernbert", str(built.settings.repository)]
        done = subprocess.run([*command, str(times)], check=True, capture_output=True, text=True)
        rows, tokens, peak_kb = map(int, done.stdout.split())
        return rows, tokens, peak_kb

    _, few, small = run(500)
    _, many, large = run(5000)
    assert few < 12_000 and many > 100_000
    assert large - small < 64_000


def test_models_that_have_no_vectors_of_spans(settings: Settings, tmp_path: Path) -> None:
    """A model that was not built for it refuses late chunking; one that cannot be is not built."""
    config = {
        "models": {
            "m": {
                "provider": "onnx",
                "model_id": "all-MiniLM-L6-v2",
                "path": str(settings.repository),
            }
        }
    }
    with Embedder(config=config) as embedder:
        with pytest.raises(errors.UnsupportedInput, match="--late-chunking"):
            embedder.embed_documents("a text", late=True)
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    for make, why in (
        (small_models.like_bge, "pools by cls, not by the mean"),
        (small_models.like_qwen3, "pools by lasttoken, not by the mean"),
        (small_models.like_distiluse, "has a Dense behind its pooling that is not linear"),
        (small_models.like_static, "embeds each token alone"),
        (small_models.like_cross_encoder, "is a reranker model"),
        (small_models.like_sentence_clip, "has a tower for images"),
        (small_models.like_router, "has a Router"),
    ):
        folder = make(tmp_path / make.__name__)
        request = build_request(str(folder), "m", precisions=("fp32",), late_chunking=True)
        with pytest.raises(errors.InvalidModel, match=why):
            build(request, home)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"spans": [[(0, 3)], []]}, "spans has 2 lists for 1 documents"),
        ({"spans": [[(0, 0)]]}, "a span from 0 to 0"),
        ({"spans": [[(2, 99)]]}, "document 0 has 6 characters, and a span from 2 to 99"),
        ({"spans": [[(0, 1, 2)]]}, "not \\(start, end\\)"),
        ({"spans": [[(0.5, 2)]]}, "not \\(start, end\\)"),
        ({"late": True, "window_overlap": 60}, "window_overlap is 60; bert reads"),
        ({"late": True, "window_overlap": -1}, "window_overlap is -1"),
        ({"window_overlap": 8}, "give late=True"),
        ({"late": True, "dimensions": 65}, "dimensions is 65"),
        ({"late": True, "no_option": 1}, "has no option `no_option`"),
        ({"tokens": 65}, "tokens is 65; bert takes at most 64"),
    ],
)
def test_invalid_arguments(embedders: dict[str, Embedder], ask: Any, message: str) -> None:
    """Arguments that no document can be cut by are InvalidInput, and say what to give."""
    with pytest.raises(errors.InvalidInput, match=message):
        embedders["bert"].embed_documents("a text", **ask)


class Served:
    """A Triton with the models of `built`."""

    def __init__(self, running: wheel.Server, steps: bool) -> None:
        self.grpc = f"127.0.0.1:{running.options.grpc_port}"
        self.http = f"http://127.0.0.1:{running.options.http_port}"
        self.steps = steps

    def ask(self, model: str, rows: list[str], spans: Any = None, **integers: int) -> Any:
        """The outputs of an ensemble, asked with Triton's own client."""
        texts = triton.InferInput("TEXT", [len(rows), 1], "BYTES")
        texts.set_data_from_numpy(np.array([[row.encode()] for row in rows], np.object_))
        inputs = [texts]
        if spans is not None:
            given = np.array(spans, np.int32)
            inputs.append(triton.InferInput("SPANS", list(given.shape), "INT32"))
            inputs[-1].set_data_from_numpy(given)
        for name, value in integers.items():
            inputs.append(triton.InferInput(name, [len(rows), 1], "INT32"))
            inputs[-1].set_data_from_numpy(np.full((len(rows), 1), value, np.int32))
        with triton.InferenceServerClient(self.grpc) as client:
            return client.infer(model, inputs)


@pytest.fixture(scope="module", params=["one process", "steps"])
def served(
    request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Triton with each model in one process, and as an ensemble of its steps."""
    steps = request.param == "steps"
    options = free_options(steps=steps)
    run = tmp_path_factory.mktemp("run")
    settings = built.settings
    with wheel.serve(settings.repository, settings.python_backend, run, options) as running:
        yield Served(running, steps)


def test_spans_on_triton(built: Built, served: Served) -> None:
    """SPANS of a text gives the reference's means, normalised, and weights that join windows."""
    model = built.references["dense"]
    text = "The river is long. It was deep — 今天, said Dr. Smith!"
    asked = [[(0, 18), (19, 50), (3, 9)], [(0, 1), (-1, -1), (-1, -1)]]
    given = served.ask("dense", [text, "a b"], asked)
    vectors_of_spans = given.as_numpy("SPAN_EMBEDDINGS")
    assert vectors_of_spans.shape == (2, 3, 48)
    whole = Window(0, len(text), 0, len(text))
    expected = late_models.pooled(model, text, asked[0], [whole])
    assert vectors.cosine(vectors_of_spans[0], expected).min() >= COSINE
    assert np.allclose(np.linalg.norm(vectors_of_spans[0], axis=1), 1, atol=1e-5)
    assert not vectors_of_spans[1, 1:].any()
    weights = given.as_numpy("SPAN_WEIGHTS")
    assert weights.shape == (2, 3)
    assert (weights > 0).tolist() == [[True, True, True], [True, False, False]]
    assert vectors.cosine(given.as_numpy("EMBEDDING"), model.encode([text, "a b"])).min() >= COSINE
    cut = served.ask("dense", [text], asked[:1], DIMENSIONS=16).as_numpy("SPAN_EMBEDDINGS")[0]
    assert vectors.cosine(cut, vectors_of_spans[0][:, :16]).min() >= COSINE
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)


def test_texts_without_spans_on_triton(built: Built, served: Served) -> None:
    """Without SPANS a model answers as any other, also a text that is cut off."""
    text = PROSE * 40
    given = served.ask("bert", [text, "short"])
    expected = built.references["bert"].encode([text, "short"])
    assert vectors.cosine(given.as_numpy("EMBEDDING"), expected).min() >= COSINE
    assert given.as_numpy("SPAN_EMBEDDINGS").shape == (2, 1, 64)
    assert not given.as_numpy("SPAN_EMBEDDINGS").any()
    assert given.as_numpy("TOKENS")[0, 0] > 64


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[(0, 99)]], "a span from 0 to 99 for text 0, which has 5 characters"),
        ([[(3, 3)]], "a span from 3 to 3"),
        ([[(-2, 3)]], "a span from -2 to 3"),
        ([[(0, 3)], [(0, 3)]], None),
    ],
)
def test_invalid_spans_on_triton(served: Served, spans: Any, message: str | None) -> None:
    """A span that is not within its text fails its request alone, with the reason."""
    with pytest.raises(InferenceServerException, match=message):
        served.ask("bert", ["hello"], spans)


def test_spans_of_a_text_that_is_cut_off(served: Served) -> None:
    """A text that the model does not take whole has no spans: the answer says what to do."""
    with pytest.raises(InferenceServerException, match="InvalidText: text 1 has .* in one pass"):
        served.ask("bert", ["hello", PROSE * 40], [[(0, 5)], [(0, 5)]])


@pytest.mark.parametrize("name", ["bert", "qwen", "modernbert"])
def test_documents_on_triton(
    built: Built,
    embedders: dict[str, Embedder],
    served: Served,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over gRPC and over HTTP, documents have the vectors of the model in this process."""
    monkeypatch.setenv("HALIMEDE_REPOSITORY", str(built.settings.repository))
    documents = [PROSE * 30, "short", "今天天气很好。" * 60]
    expected = embedders[name].embed_documents(documents, tokens=48, overlap=8, late=True)
    for url in (served.grpc, served.http):
        with Embedder(url, name) as embedder:
            got = embedder.embed_documents(documents, tokens=48, overlap=8, late=True)
        assert got.spans.tolist() == expected.spans.tolist()
        assert got.documents.tolist() == expected.documents.tolist()
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert (got.space, got.provider) == (expected.space, "triton")
        assert vectors.cosine(got.vectors, expected.vectors).min() >= COSINE


def test_cached_windows(built: Built, tmp_path: Path) -> None:
    """A document that was embedded before comes from the cache, window by window."""
    config = built.config("bert") | {"cache": {"memory_mb": 16}}
    with Embedder(config=config) as embedder:
        first = embedder.embed_documents(PROSE * 20, tokens=40, late=True)
        again = embedder.embed_documents(PROSE * 20, tokens=40, late=True)
    assert not first.cached.any() and again.cached.all()
    assert (first.vectors == again.vectors).all()


def test_parts_of_a_text_through_the_gateway(
    built: Built, embedders: dict[str, Embedder], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jina's `late_chunking`: the texts are parts of one, with a vector for each, in order."""
    monkeypatch.setenv("HALIMEDE_REPOSITORY", str(built.settings.repository))
    parts = [PROSE * 30, "It was deep.", " It was 今天.", "No space"]
    whole, spans = joined(parts)
    assert whole[spans[1][0] - 1] == "\n" and whole[spans[3][0] - 1] == " "
    assert [whole[start:end] for start, end in spans] == parts
    expected = embedders["bert"].embed_documents(whole, spans=[spans], late=True)
    assert not expected.truncated.any() and expected.tokens[0] > 64
    model = {"bert": {"provider": "triton", "model_id": "bert", "url": served.grpc}}
    with gateway(model) as address, httpx.Client(base_url=address, timeout=60) as http:
        asked = {"model": "bert", "input": parts, "late_chunking": True, "truncate": False}
        answer = http.post("/v1/embeddings", json=asked)
        assert answer.is_success, answer.text
        assert_alike([row["embedding"] for row in answer.json()["data"]], expected.vectors, COSINE)
        assert answer.json()["usage"]["total_tokens"] == expected.tokens.sum()
        assert answer.headers["halimede-truncated"] == "0"
        empty = http.post("/v1/embeddings", json=asked | {"input": ["a", ""]})
        assert (empty.status_code, "is empty" in empty.text) == (400, True)
        monkeypatch.setenv("HALIMEDE_REPOSITORY", "/nowhere")
        refused = http.post("/v1/embeddings", json=asked)
        assert (refused.status_code, refused.json()["error"]["param"]) == (501, "late_chunking")
