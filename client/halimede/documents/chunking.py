"""Chunking: a text to parts that a model takes whole, cut at sentences where they fit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from halimede.documents import tokenizers
from halimede.documents.tokenizers import ModelTokenizer
from halimede.extras import needs_extra
from halimede.inputs.options import check_whole
from halimede.inputs.texts import encode_text
from halimede_ops.errors import InvalidInput, UnsupportedInput

DOCUMENT = "document"
"""Input type of documents."""
MIN_BLOCK_CHARACTERS = 4096
BLOCK_CHARACTERS_PER_TOKEN = 8
"""The splitter gets a text in blocks of so many characters for each token of a chunk: the time it
takes for a block without a place to cut grows with the square of the block's length."""


class Chunk(NamedTuple):
    """A part of a text, without white space around it."""

    text: str
    start: int
    """Index of its first character in the text that was cut."""
    end: int
    """Index behind its last character: `text[start:end]` is the chunk."""
    tokens: int
    """Tokens that the model counts for it alone, special tokens and prompt included."""


class Chunker:
    """Cuts texts into chunks for one model. Safe to use from several threads.

    A text is cut between paragraphs where they fit, else between sentences, else between words,
    else within a word: https://unicode.org/reports/tr29 defines sentences and words.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        tokens: int | None = None,
        overlap: int = 0,
        input_type: str | None = DOCUMENT,
    ) -> None:
        """Prepare to cut texts for a model.

        Args:
            tokenizer: the model's tokenizer.
            tokens: maximum tokens of a chunk, as the model counts them: special tokens and the
                prompt of `input_type` included. Default: the model's token limit.
            overlap: maximum tokens that a chunk has in common with the one before it.
            input_type: input type that the chunks are embedded with.

        Raises:
            InvalidInput: `tokens` is above the model's limit or leaves no room for a text, or
                `overlap` does not leave room for new text in every chunk.
            UnknownInputType: the model has no prompt of this input type.
            UnsupportedInput: the model takes pairs of texts.
            MissingExtra: the package semantic-text-splitter is not installed.
        """
        self._tokenizer = tokenizer
        self._input_type = input_type
        spec = tokenizer.spec
        if spec.takes_pairs:
            raise UnsupportedInput(f"{spec.name} takes pairs of texts; chunk for another model.")
        limit = token_limit(tokenizer, input_type)
        self.tokens = limit if tokens is None else check_whole("tokens", tokens, 1)
        self.overlap = check_whole("overlap", overlap, 0)
        if self.tokens > limit:
            raise InvalidInput(f"tokens is {self.tokens:,}; {spec.name} takes at most {limit:,}.")
        [self._taken] = self._count([""])
        room = self._room(spec.name)
        with needs_extra("documents"):
            from semantic_text_splitter import TextSplitter
        self._splitter = TextSplitter.from_huggingface_tokenizer(
            tokenizer.tokenizer, room, overlap=self.overlap
        )
        self._exact = TextSplitter.from_callback(lambda text: self._count([text])[0], self.tokens)

    def _room(self, name: str) -> int:
        """The tokens of text that a chunk has room for.

        Raises:
            InvalidInput: there is none, or no more than the overlap takes.
        """
        room = self.tokens - self._taken
        if room < 1:
            raise InvalidInput(
                f"tokens is {self.tokens:,}, and {name}'s special tokens and prompt take "
                f"{self._taken:,} of each chunk. Give more."
            )
        if self.overlap >= room:
            raise InvalidInput(
                f"overlap is {self.overlap:,}; chunks of {self.tokens:,} tokens have room for "
                f"{room:,} tokens of text. Give less than that."
            )
        return room

    def __call__(self, text: str) -> list[Chunk]:
        """Cut a text into chunks, in its order.

        Every character is in a chunk, except white space between chunks. A text of white space
        alone has one chunk, which is empty.

        Raises:
            InvalidText: it is no string, or has a lone surrogate.
            InvalidInput: a character alone has more tokens than a chunk may have.
        """
        encode_text(text, 0)  # what cannot be sent is refused here
        chunks = self._checked(list(self._split(text)))
        return chunks or [Chunk("", 0, 0, self._taken)]

    def _split(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the start and the text of each part, a block of the text at a time.

        The last part of a block ends where the block does, so the next block begins with it.
        """
        start = 0
        least = max(MIN_BLOCK_CHARACTERS, BLOCK_CHARACTERS_PER_TOKEN * self.tokens)
        length = least
        while start < len(text):
            parts = self._splitter.chunk_indices(text[start : start + length])
            if start + length >= len(text):
                yield from ((start + place, part) for place, part in parts)
                return
            if not parts:
                start += length
            elif len(parts) == 1:
                length *= 2
            else:
                yield from ((start + place, part) for place, part in parts[:-1])
                start, length = start + parts[-1][0], least

    def _checked(self, parts: Sequence[tuple[int, str]]) -> list[Chunk]:
        """Make a chunk of each part. A part with too many tokens is cut again.

        The splitter counts the tokens of a part without prompt and special tokens. Together they
        may be more.
        """
        chunks = []
        counts = self._count([text for _, text in parts])
        for (start, text), count in zip(parts, counts, strict=True):
            if count <= self.tokens:
                chunks.append(Chunk(text, start, start + len(text), count))
            elif len(text) > 1:
                again = self._exact.chunk_indices(text)
                chunks += self._checked([(start + place, part) for place, part in again])
            else:
                raise InvalidInput(
                    f"tokens is {self.tokens:,}, and a character of the text takes {count:,} with "
                    "special tokens and prompt. Give more."
                )
        return chunks

    def _count(self, texts: Sequence[str]) -> list[int]:
        """The tokens that the model counts for each text; above its limit perhaps fewer."""
        encoded = self._tokenizer.reader.encode(texts, [self._input_type] * len(texts))
        return [tokens.total for tokens in encoded]


@functools.lru_cache(maxsize=16)
def chunker_of(folder: Path, tokens: int | None, overlap: int, input_type: str | None) -> Chunker:
    """Return the chunker for a tokenizer's folder. Raises as `Chunker`."""
    return Chunker(tokenizers.read(folder), tokens, overlap, input_type)


def token_limit(tokenizer: ModelTokenizer, input_type: str | None) -> int:
    """The token limit of texts of an input type."""
    spec = tokenizer.spec
    if spec.late is None:
        return spec.max_tokens
    return spec.late.query_tokens if spec.is_query(input_type) else spec.late.document_tokens
