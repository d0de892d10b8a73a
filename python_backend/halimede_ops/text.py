"""Texts to token ids: prepend the prompt, tokenize, truncate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from halimede_ops.errors import InvalidModel, InvalidText
from halimede_ops.spec import ModelSpec

FILE_NAME = "tokenizer.json"


class Tokens(NamedTuple):
    """One tokenized text."""

    ids: list[int]
    """At most `max_tokens` token ids, special tokens included."""
    total: int
    """Tokens of the whole text, special tokens included; above `max_tokens` it was truncated."""


class TextTokenizer:
    """A model's tokenizer, with its prompts and its token limit."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec.max_tokens)
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
        self.spec = spec

    def encode(self, texts: Sequence[str], input_types: Sequence[str | None]) -> list[Tokens]:
        """Prepend each text's prompt and tokenize it, as sentence-transformers does; in order.

        Raises:
            UnknownInputType: the model has no prompt for an input type.
        """
        return self.encode_prompted(self.prompted(texts, input_types))

    def prompted(self, texts: Sequence[str], input_types: Sequence[str | None]) -> list[str]:
        """Prepend to each text the prompt of its input type.

        Raises:
            UnknownInputType: the model has no prompt for an input type.
        """
        return [
            self.spec.prompt(input_type) + text
            for text, input_type in zip(texts, input_types, strict=True)
        ]

    def encode_prompted(self, prompted: Sequence[str]) -> list[Tokens]:
        """Tokenize texts that have their prompts already; in order."""
        return [self._tokens(encoding) for encoding in self._tokenizer.encode_batch_fast(prompted)]

    def _tokens(self, encoding) -> Tokens:  # type: ignore[no-untyped-def]
        ids = encoding.ids
        # Every overflowing part has special tokens of its own.
        overflowing = sum(len(part.ids) - self._special_tokens for part in encoding.overflowing)
        return Tokens(ids, len(ids) + overflowing)


def load(folder: Path, spec: ModelSpec) -> TextTokenizer:
    """Read `tokenizer.json` from a version folder of the repository.

    Raises:
        InvalidModel: the file is missing or is no tokenizer.
    """
    try:
        return TextTokenizer(Tokenizer.from_file(str(folder / FILE_NAME)), spec)
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"{FILE_NAME} cannot be read; build the model again") from error


def decode(value: bytes | str, row: int, spec: ModelSpec) -> str:
    """Decode one BYTES element; `row` is its number in error messages.

    Raises:
        InvalidText: the text is not valid UTF-8, or is larger than `spec.max_text_bytes`.
    """
    if len(value) > spec.max_text_bytes:
        raise InvalidText(
            f"has {len(value):,} bytes; {spec.name} takes {spec.max_text_bytes:,}. "
            "Split it into parts.",
            subject="text",
            index=row,
        )
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"is not valid UTF-8 (byte {error.start}). Send it encoded as UTF-8.",
            subject="text",
            index=row,
        ) from None
