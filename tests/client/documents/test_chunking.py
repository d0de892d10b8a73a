"""Chunks: the model takes each whole, and together they are the text."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from halimede import Chunk, Chunker, Embedder
from halimede.documents.tokenizers import ModelTokenizer
from halimede_ops import errors, text
from halimede_ops.spec import ModelSpec

PROSE = "The river is long. It was 3.5 m deep, said Dr. Smith! Was it? Yes — it was.\r\n"
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "wordpiece": small_models.wordpiece,
    "unigram": small_models.unigram,
    "roberta": lambda: small_models.byte_level("roberta"),
    "qwen": lambda: small_models.byte_level("qwen"),
    "gemma": small_models.gemma,
}


def model_tokenizer(kind: str, prompt: str = "", max_tokens: int = 256) -> ModelTokenizer:
    def copy() -> Tokenizer:
        return Tokenizer.from_str(KINDS[kind]().to_str())

    spec = ModelSpec(
        kind, "0" * 16, 64, max_tokens, normalised=True, prompts={"query": "", "document": prompt}
    )
    return ModelTokenizer(copy(), spec, text.TextTokenizer(copy(), spec))


@pytest.fixture(scope="module")
def chunkers() -> list[Chunker]:
    """Chunkers of every kind of tokenizer, with and without a prompt and an overlap."""
    return [
        Chunker(model_tokenizer(kind, prompt), tokens, overlap)
        for kind in KINDS
        for prompt, tokens, overlap in (("", 24, 0), ("search document: ", 48, 10))
    ]


def check(chunker: Chunker, whole: str, chunks: list[Chunk]) -> None:
    """The chunks are parts of the text, in order, none too long, that leave out white space only."""
    own = chunker._tokenizer  # noqa: SLF001
    counts = own.reader.encode([chunk.text for chunk in chunks], ["document"] * len(chunks))
    assert [chunk.tokens for chunk in chunks] == [tokens.total for tokens in counts]
    assert all(chunk.tokens <= chunker.tokens for chunk in chunks)
    assert all(whole[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert [chunk.start for chunk in chunks] == sorted({chunk.start for chunk in chunks})
    end = 0
    for chunk in chunks:
        assert not whole[end : chunk.start].strip()
        if not chunker.overlap:
            assert chunk.start >= end
        end = max(end, chunk.end)
    assert not whole[end:].strip()


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=40),
            st.sampled_from(
                [
                    "[SEP]",
                    "</s>",
                    "👩‍👩‍👧‍👦",
                    "é",
                    "今天天气很好。",
                    "مرحبا بالعالم. ",
                    "\r\n\r\n",
                    " " * 30,
                ]
                + ["x" * 150, PROSE, "\u00ad", "\ufeff", "\u2028", "word " * 30]
            ),
        ),
        max_size=30,
    ).map("".join)
)
@example(PROSE * 400)
@example("")
def test_chunks_are_the_text_and_none_is_truncated(chunkers: list[Chunker], whole: str) -> None:
    """Whatever the text, each chunk has at most as many tokens as asked, as the model counts."""
    for chunker in chunkers:
        check(chunker, whole, chunker(whole))


def test_chunks_end_where_sentences_do() -> None:
    """A text of sentences that fit is cut between them, abbreviations and numbers left whole."""
    chunks = Chunker(model_tokenizer("wordpiece"), 60)(PROSE * 50)
    ends = ("!", "?", ".", "yes — it was.")
    assert len(chunks) > 20
    assert sum(chunk.text.endswith(ends) for chunk in chunks) == len(chunks)
    assert not any(chunk.text.startswith(("5 m", "deep")) for chunk in chunks)


def test_chunks_overlap_by_at_most_the_tokens_asked() -> None:
    """Each chunk begins within the one before, by at most `overlap` tokens."""
    own = model_tokenizer("wordpiece")
    whole = " ".join(f"w{index}" for index in range(3000))
    chunks = Chunker(own, 64, 16)(whole)
    shared = [whole[after.start : before.end] for before, after in zip(chunks, chunks[1:])]
    counts = [len(own.tokenizer.encode(part, add_special_tokens=False)) for part in shared]
    assert 0 < min(counts) <= max(counts) <= 16


@pytest.mark.parametrize(
    "whole",
    [
        "ab1" * 165_000,
        "word " * 100_000,
        PROSE * 6_000,
        "今天天气很好。" * 30_000,
        "🎉" * 80_000,
        "\r\n" * 250_000,
    ],
    ids=["one word", "no sentences", "prose", "chinese", "emoji", "line ends"],
)
@pytest.mark.parametrize("kind", ["wordpiece", "roberta"])
def test_long_texts_take_linear_time(whole: str, kind: str) -> None:
    """Eight times the text takes less than sixteen times the CPU time, whatever the text is of."""
    chunker = Chunker(model_tokenizer(kind), 128, 16)
    part = whole[: len(whole) // 8]

    def cpu_s(value: str) -> float:
        began = time.process_time()
        check(chunker, value, chunker(value))
        return time.process_time() - began

    assert cpu_s(whole) < 16 * max(0.05, min(cpu_s(part) for _ in range(3)))


@pytest.mark.parametrize(
    ("tokens", "overlap", "message"),
    [
        (257, 0, "tokens is 257; wordpiece takes at most 256."),
        (0, 0, "tokens is 0; give a whole number of at least 1."),
        (2, 0, "special tokens and prompt take 2 of each chunk"),
        (10, 8, "overlap is 8; chunks of 10 tokens have room for 8 tokens of text."),
        (10, -1, "overlap is -1; give a whole number of at least 0."),
        (10, 1.5, "overlap is 1.5"),
        (True, 0, "tokens is bool"),
    ],
)
def test_what_leaves_no_room_is_refused(tokens: int, overlap: int, message: str) -> None:
    """`tokens` and `overlap` that no chunk can have are InvalidInput, which names them."""
    with pytest.raises(errors.InvalidInput, match=message):
        Chunker(model_tokenizer("wordpiece"), tokens, overlap)


def test_a_character_that_does_not_fit_is_refused() -> None:
    """An emoji of four tokens is never cut: a chunk of two tokens of text cannot have it."""
    with pytest.raises(errors.InvalidInput, match="a character of the text takes"):
        Chunker(model_tokenizer("roberta"), 4)("ab 🎉")


def test_a_text_that_cannot_be_sent_is_refused() -> None:
    """Half of a surrogate pair, and what is no string, are InvalidText."""
    chunker = Chunker(model_tokenizer("wordpiece"))
    for value in ("a\ud800", b"bytes", None):
        with pytest.raises(errors.InvalidText):
            chunker(value)  # type: ignore[arg-type]


def onnx_config(path: Path, name: str = "all-MiniLM-L6-v2") -> dict:
    return {"models": {"m": {"provider": "onnx", "model_id": name, "path": str(path)}}}


def test_a_chunker_of_the_served_model(server, settings, texts: list[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """On Triton and in process a model cuts texts alike, by its tokenizer on this machine."""
    whole = PROSE * 100
    with Embedder(config=onnx_config(settings.repository)) as local:
        with Embedder(f"127.0.0.1:{server.options.grpc_port}") as served:
            assert served.chunk(whole, 64, 8) == local.chunk(whole, 64, 8)
            monkeypatch.setenv("HALIMEDE_REPOSITORY", "/nowhere")
            with pytest.raises(errors.ModelNotFound, match="not on this machine"):
                served.chunk(whole)
        assert local.chunk(whole)[0].tokens > 200
    with Embedder(config={"models": {"m": {"provider": "hash", "model_id": "h"}}}) as other:
        with pytest.raises(errors.UnsupportedInput, match="gives no tokenizer"):
            other.chunker()
