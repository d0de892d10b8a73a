"""Texts that the build calibrates INT8 with, and texts that it checks vectors with.

Both are drawn from the sentences in `data/`, written for this project, by seeded random choice: the
same texts on every machine, and no text in both sets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from halimede_ops.errors import InvalidInput
from halimede_ops.lines import read_lines

SENTENCES = (Path(__file__).parent / "data" / "sentences.txt").read_text("utf-8").splitlines()

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


def calibration_texts(count: int = 300) -> list[str]:
    """Texts to take activation ranges from: the even sentences, alone and joined."""
    return list(_drawn(SENTENCES[::2], count, random.Random(1)))


def calibration(file: Path | None) -> list[str]:
    """The lines of the user's file, else the built-in calibration texts.

    Raises:
        InvalidInput: the file cannot be read or has no text.
    """
    if file is None:
        return calibration_texts()
    lines = [line for line in read_lines(file, "the calibration file") if line.strip()]
    if not lines:
        raise InvalidInput("the calibration file has no text; give one text a line.")
    return lines


def check_texts(count: int = 600) -> list[str]:
    """Texts to compare vectors on: the odd texts, then the odd sentences, alone and joined."""
    drawn = _drawn(SENTENCES[1::2], count - len(ODD_TEXTS), random.Random(2))
    return [*ODD_TEXTS, *drawn]


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
