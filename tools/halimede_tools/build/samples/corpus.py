"""Texts that the build calibrates INT8 with, and texts that it checks vectors with.

Both are drawn from the texts in `data/`, written for this project, by seeded random choice: the
same texts on every machine, and no text in both sets. Most are short, as user texts are: queries,
questions, titles, list items, messages and headlines, in many languages.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from halimede_ops.errors import InvalidInput
from halimede_ops.lines import read_lines
from halimede_ops.text import Query

DATA = Path(__file__).parent / "data"
SENTENCES = (DATA / "sentences.txt").read_text("utf-8").splitlines()
SHORT_TEXTS = (DATA / "short.txt").read_text("utf-8").splitlines()
"""Queries, questions, titles, list items, messages and headlines, in many languages."""

LEAST_TEXTS = 100
"""Fewest texts to calibrate INT8 on. 100 mixed texts give the default model a mean cosine of 0.997,
25 give 0.993 and three give 0.90 to 0.94; the bar is 0.995."""

ODD_TEXTS = (
    "",
    " ",
    "\n\t \r\n",
    "a",
    "?",
    "0",
    "…",
    "🙂",
    "🚀🚀🚀 to the moon 🌕",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 thumb",
    "\x00",
    "a\x00b",
    "\x07\x1b[31mred\x1b[0m",
    "\u200b\u200e\ufeff",
    "\ufffd\ufffe",
    "e\u0301 and é",
    "ﬁne ﬂour",
    "ＦＵＬＬ　ＷＩＤＴＨ",
    "İstanbul ıssız",
    "ß ẞ ss",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕗𝕠𝕟𝕥𝕤",
    "[CLS] [SEP] [PAD] [MASK] [UNK]",
    "<s></s> <pad> <unk>",
    "##ing ##ed",
    "https://example.org/a/very/long/path?query=1&other=two#part",
    '{"key": [1, 2.5, null, true]}',
    "x" * 300,
    "word " * 400,
    "漢" * 300,
    "مرحبا " * 200,
    "🙂" * 300,
    "\t".join(str(number) for number in range(300)),
)
"""Empty, blank, control characters, emoji, special tokens, words too long for the vocabulary."""

REPEATED_TEXTS = (
    "data " * 300,
    "na " * 120,
    "字" * 250,
    "х" * 200,
    "سلام " * 200,
    "का " * 150,
    "=" * 80,
    "| | | --- | --- |" * 20,
    " ".join(str(7 * number) for number in range(200)),
)
"""Texts that repeat a token: they give larger activations than others."""


QUERIES, DOCUMENTS = 24, 16
"""Queries of the pairs of a set, and documents of each query."""


def calibration_texts(count: int = 500) -> list[str]:
    """Texts to take activation ranges from: the even short texts, and the even sentences, alone and
    joined; and the repeated texts.
    """
    kept = [*SHORT_TEXTS[::2], *REPEATED_TEXTS]
    return [*kept, *_drawn(SENTENCES[::2], count - len(kept), random.Random(1))]


def calibration(file: Path | None) -> list[str]:
    """The lines of the user's file, else the built-in calibration texts.

    Raises:
        InvalidInput: the file cannot be read or has too few texts.
    """
    if file is None:
        return calibration_texts()
    lines = [line for line in read_lines(file, "the calibration file") if line.strip()]
    different = len(set(lines))
    if different < LEAST_TEXTS:
        raise InvalidInput(
            f"the calibration file has {different} different texts, one a line; give {LEAST_TEXTS} "
            "or more. Ranges of fewer texts do not hold for others."
        )
    return lines


def check_texts(count: int = 600) -> list[str]:
    """Texts to compare vectors on: the odd texts, the short texts and sentences that calibration
    does not use, alone and joined.
    """
    kept = [*ODD_TEXTS, *SHORT_TEXTS[1::2]]
    return [*kept, *_drawn(SENTENCES[1::2], count - len(kept), random.Random(2))]


def pairs(texts: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Pairs of a query and a document: DOCUMENTS for each of QUERIES, which follow each other."""
    chance = random.Random(seed)
    queries = [text for text in SHORT_TEXTS if text.endswith("?")][seed % 2 :: 2][:QUERIES]
    return [(query, chance.choice(texts)) for query in queries for _ in range(DOCUMENTS)]


def calibration_pairs(file: Path | None) -> list[tuple[str, str]]:
    """Pairs of the texts of `calibration`."""
    return pairs(calibration(file), 1)


def texts_and_pairs(
    texts: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[str | tuple[str, str]]:
    """Half of the texts and half of the pairs, for a model that takes both."""
    return [*texts[::2], *pairs[::2]]


def check_pairs() -> list[tuple[str, str]]:
    """Pairs to compare scores on: each odd text as query and as document, then pairs of the texts
    of `check_texts`.
    """
    odd = [(text, "a document") for text in ODD_TEXTS] + [("a query", text) for text in ODD_TEXTS]
    return [*odd, *pairs(check_texts(), 2)]


def as_queries_and_documents(texts: Sequence[str]) -> list[str | Query]:
    """Every fourth text as a query, and all texts as documents."""
    return [*map(Query, texts[::4]), *texts]


def check_queries_and_documents() -> list[str | Query]:
    """Queries and documents to compare vectors on: each odd text as both, then texts of
    `check_texts`.
    """
    odd, texts = ODD_TEXTS, check_texts(400)[len(ODD_TEXTS) :]
    return [*map(Query, odd), *odd, *as_queries_and_documents(texts)]


def mixed_texts(count: int = 1000, seed: int = 3) -> list[str]:
    """Texts of mixed length for load and speed: a median of about 30 tokens, some beyond 256."""
    return list(_drawn(SENTENCES, count, random.Random(seed)))


def _drawn(sentences: list[str], count: int, chance: random.Random) -> Iterator[str]:
    """Each sentence once, then several joined, with the lengths of user texts: most are short."""
    yield from sentences[:count]
    for _ in range(count - len(sentences)):
        parts = min(40, int(chance.expovariate(1 / 2.2)) + 1)
        joined = " ".join(chance.choice(sentences) for _ in range(parts))
        yield joined if chance.random() < 0.9 else joined[: chance.randint(1, 40)]
