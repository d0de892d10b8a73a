"""A long text that is cut before it is tokenized has the token ids of the whole text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import pytest
import small_models
from conftest import MODEL, version_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from halimede_ops import cuts, spec, text
from halimede_ops.text import TextTokenizer
from halimede_tools.build.samples.corpus import SENTENCES
from halimede_tools.settings import Settings

FOLDER = version_folder(Settings().repository / f"{MODEL}-tokenizer")
MAX_TOKENS = 16
SPEC = dataclasses.replace(spec.load(FOLDER), max_tokens=MAX_TOKENS)


def bert() -> Tokenizer:
    """The default model's own."""
    return Tokenizer.from_file(str(FOLDER / text.FILE_NAME))


def llama() -> Tokenizer:
    """Byte-level BPE with the words of Llama 3."""
    tokenizer = copy(small_models.byte_level("roberta"))
    [pattern] = [one for one in cuts.SPLITS if "{1,3}" in one]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def xlm_roberta() -> Tokenizer:
    """Unigram whose words are split at all white space first, as XLM-R's."""
    tokenizer = copy(small_models.unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return tokenizer


def whitespace() -> Tokenizer:
    """WordPiece with regular-expression words."""
    tokenizer = copy(small_models.wordpiece())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def gemma() -> Tokenizer:
    """BPE over ▁-joined text, whose tokens never span two words, as Gemma's."""
    vocabulary: dict[str, int] = {"<unk>": 0, "<bos>": 1, "<eos>": 2}
    merges = [
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("a", "n"),
        ("an", "d"),
        ("▁", "and"),
        ("i", "n"),
    ]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,\n"]
    for token in [*letters, *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


KINDS = MappingProxyType(
    {
        "bert": bert,
        "wordpiece": small_models.wordpiece,
        "whitespace": whitespace,
        "unigram": small_models.unigram,
        "xlm-roberta": xlm_roberta,
        "roberta": lambda: small_models.byte_level("roberta"),
        "qwen": lambda: small_models.byte_level("qwen"),
        "llama": llama,
        "gemma": gemma,
        "clip": small_models.clip_bpe,
    }
)


def copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def cutting(tokenizer: Tokenizer, characters: int, side: str = "right") -> TextTokenizer:
    """With texts cut after so many characters; `side` is the one that is truncated."""
    copied = copy(tokenizer)
    copied.enable_truncation(MAX_TOKENS, direction=side)
    opened = TextTokenizer(copied, SPEC)
    opened.counted_characters = characters
    return opened


WORDS = st.sampled_from(
    [word for sentence in SENTENCES for word in sentence.split()]
    + [
        "a",
        "I'm",
        "don't",
        "x_1",
        "3,000.5",
        "e\u0301",
        "一只猫。",
        "ですか？",
        "สวัสดี",
        "안녕",
        "🙂",
    ]
    + ["ﬁ", "ﷺ", "①", "Ａ", "<s>", "[CLS]", "<|endoftext|>", "``", "...", "a.b.c", "w" * 120]
)
GAPS = st.sampled_from(
    [" ", " ", " ", "  ", "\n", "\r\n", " \n ", "\t", "", ",", ", ", ". ", "\u3000"]
)
TEXTS = st.one_of(
    st.lists(st.tuples(WORDS, GAPS), min_size=30, max_size=120).map(
        lambda pairs: "".join(word + gap for word, gap in pairs)
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=60, max_size=400),
    st.text("aé一.,' \n\u0301\u3000▁_1", min_size=60, max_size=400),
)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_cut_has_the_ids_of_the_whole_text(kind: str, side: str) -> None:
    """For each kind of tokenizer, side of truncation and any text: the same ids, and a number of
    tokens that says rightly whether the text was truncated and is never more than the whole text
    has.
    """
    tokenizer = KINDS[kind]()
    cut, whole = cutting(tokenizer, 40, side), cutting(tokenizer, 10**9, side)
    were_cut = 0

    @settings(max_examples=150)
    @given(TEXTS)
    def check(value: str) -> None:
        nonlocal were_cut
        [of_cut], [of_whole] = cut.encode_prompted([value]), whole.encode_prompted([value])
        assert of_cut.ids == of_whole.ids
        assert (of_cut.total > MAX_TOKENS) == (of_whole.total > MAX_TOKENS)
        assert of_cut.total <= of_whole.total
        were_cut += of_cut.total < of_whole.total

    check()
    assert were_cut > 20


def test_the_tokens_of_the_first_part_are_those_of_the_whole_text() -> None:
    """Every token of a part, not only those within the limit, is the whole text's."""
    value = " ".join(SENTENCES[:200]) * 4
    for kind, make in KINDS.items():
        tokenizer = copy(make())
        tokenizer.no_truncation()
        places = cuts.places(tokenizer)
        part = cuts.cut(value, 3000, places)
        assert 3000 <= len(part) < 3000 + cuts.WINDOW, kind
        ids = tokenizer.encode(part, add_special_tokens=False).ids
        assert ids == tokenizer.encode(value, add_special_tokens=False).ids[: len(ids)], kind


def changed(change: Callable[[Tokenizer], object]) -> Tokenizer:
    tokenizer = copy(small_models.unigram())
    change(tokenizer)
    return tokenizer


def of_merges_across_words() -> Tokenizer:
    """BPE over the whole text, with a token that spans two words."""
    vocabulary = {token: index for index, token in enumerate(["a", "▁", "b", "a▁", "a▁b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "▁"), ("a▁", "b")]))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def with_normalizer(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(Regex("x.*"), "")


def with_words(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Callable[[Tokenizer], None]:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizer

    return change


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(with_normalizer),
        changed(with_words(pre_tokenizers.Metaspace(split=False))),
        changed(with_words(pre_tokenizers.Split(Regex("[^x]+"), "isolated"))),
        changed(with_words(pre_tokenizers.ByteLevel(use_regex=False))),
        changed(lambda tokenizer: tokenizer.add_tokens(["New York"])),
        of_merges_across_words(),
        small_models.gemma(),
    ],
    ids=["normalizer", "unsplit", "pattern", "bytes", "added", "merges", "phrases"],
)
def test_what_is_not_known_to_be_safe_is_not_cut(tokenizer: Tokenizer) -> None:
    """A tokenizer whose tokens may depend on what follows a word gets the whole text."""
    assert cuts.places(tokenizer) is None
    assert cuts.cut("a b " * 1000, 10, None) == "a b " * 1000


@pytest.mark.parametrize(
    ("value", "total"),
    [
        ("word " * 800_000, None),
        (" " * 4_000_000, 2),
        ("w" * 4_000_000, 3),
        ("." * 4_000_000, None),
    ],
    ids=["words", "spaces", "one word", "marks"],
)
def test_a_text_of_4_mb_is_truthfully_truncated(value: str, total: int | None) -> None:
    """At the real size: few tokens are counted to the end; with many, more than the limit are."""
    opened = text.load(FOLDER, spec.load(FOLDER))
    [tokens] = opened.encode_prompted([value])
    if total is None:
        assert opened.spec.max_tokens < tokens.total <= opened.counted_characters + 2
        [start] = opened.encode_prompted([value[:20_000]])
        assert tokens.ids == start.ids
    else:
        assert tokens.total == len(tokens.ids) == total


def test_a_text_within_the_counted_characters_has_its_exact_number() -> None:
    """65,536 characters, prompt included, are counted to the last token."""
    opened = text.load(FOLDER, spec.load(FOLDER))
    [tokens] = opened.encode_prompted(["word " * (text.COUNTED_CHARACTERS // 5)])
    assert tokens.total == text.COUNTED_CHARACTERS // 5 + 2
