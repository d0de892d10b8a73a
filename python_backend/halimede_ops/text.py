"""Texts to token ids: put the prompt in front, tokenize, truncate."""

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
    """Token ids, special tokens included, at most the model's `max_tokens`."""
    total: int
    """Tokens the whole text has, special tokens included; above `max_tokens` it was truncated."""


class TextTokenizer:
    """A model's tokenizer with its prompts and token limit."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec.max_tokens)
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
        self.spec = spec

    def encode(self, texts: Sequence[str], input_types: Sequence[str | None]) -> list[Tokens]:
        """One Tokens a text, in order; as sentence-transformers tokenizes the same text.

        Raises:
            UnknownInputType: an input type is not one of the model's.
        """
        return self.encode_prompted(self.prompted(texts, input_types))

    def prompted(self, texts: Sequence[str], input_types: Sequence[str | None]) -> list[str]:
        """Each text behind the prompt of its input type.

        Raises:
            UnknownInputType: an input type is not one of the model's.
        """
        return [
            self.spec.prompt(input_type) + text
            for text, input_type in zip(texts, input_types, strict=True)
        ]

    def encode_prompted(self, prompted: Sequence[str]) -> list[Tokens]:
        """One Tokens a text that has its prompt, in order."""
        return [self._tokens(encoding) for encoding in self._tokenizer.encode_batch_fast(prompted)]

    def _tokens(self, encoding) -> Tokens:  # type: ignore[no-untyped-def]
        ids = encoding.ids
        beyond = encoding.overflowing
        return Tokens(ids, len(ids) + sum(len(part.ids) - self._special_tokens for part in beyond))


def load(folder: Path, spec: ModelSpec) -> TextTokenizer:
    """TextTokenizer from `tokenizer.json` in a version folder of the repository.

    Raises:
        InvalidModel: the file is missing or not a tokenizer.
    """
    try:
        return TextTokenizer(Tokenizer.from_file(str(folder / FILE_NAME)), spec)
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"{FILE_NAME} cannot be read; build the model again") from error


def decode(value: bytes | str, row: int, spec: ModelSpec) -> str:
    """The text of one BYTES element.

    Raises:
        InvalidText: it is not valid UTF-8 or larger than `spec.max_text_bytes`.
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
