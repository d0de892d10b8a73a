"""Texts to token ids: prepend the prompt, tokenize, truncate.

Of a text that is too long, most models keep the beginning and some the end, as `tokenizer.json`
says. A text far beyond the token limit is cut before it is tokenized, where that does not change
its token ids: see `halimede_ops.cuts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tokenizers import Tokenizer

from halimede_ops import cuts, spans
from halimede_ops.errors import InvalidInput, InvalidModel, InvalidText
from halimede_ops.spec import MAX_REQUEST_BYTES, POOLED_TOKENS, LateSpec, ModelSpec

FILE_NAME = "tokenizer.json"
COUNTED_CHARACTERS = 65_536
"""A text of up to so many characters, prompt included, is tokenized as a whole: its number of
tokens is exact. English takes 15 to 30 ms."""
CHARACTERS_PER_TOKEN = 16
"""For each token of the model's limit so many characters are tokenized, if that is more."""


TextPair = tuple[str, str]
"""Two texts that the model reads together: query and document, or text and second text."""


class Query(NamedTuple):
    """A text that a late-interaction model reads as a query. A plain string is a document."""

    text: str


Item = str | TextPair | Query | spans.Spanned
"""What is tokenized as one: a text, or a pair of texts, with its prompt in front."""


class Tokens(NamedTuple):
    """One tokenized text, or pair of texts."""

    ids: list[int]
    """At most `max_tokens` token ids, special tokens included."""
    total: int
    """Tokens of the whole text, special tokens included; above `max_tokens` it was truncated.
    If the text was cut before it was tokenized: those of the part that is left, above
    `max_tokens`."""
    types: list[int] | None = None
    """0 for each token of the first text of a pair, 1 for those of the second. None: the model
    takes no token types."""
    kept: list[int] | None = None
    """1 for each token with a vector in the answer of a late-interaction model, 0 for the others.
    None: the model is of another kind."""
    unattended: int = 0
    """How many tokens at the end, which fill up a query, no token attends to."""
    spans: np.ndarray | None = None
    """Tokens of each span: see `halimede_ops.spans.tokens_of`. None: the model takes no spans."""


class TextTokenizer:
    """A model's tokenizer, with its prompts and its token limit."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self._keeps_end = (tokenizer.truncation or {}).get("direction") == "left"
        self._cut = cuts.cut_front if self._keeps_end else cuts.cut
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = spec.splits_special_tokens
        tokenizer.enable_truncation(
            spec.max_tokens, direction="left" if self._keeps_end else "right"
        )
        self._tokenizer = tokenizer
        self._whole = _without_truncation(tokenizer) if spec.takes_pairs else tokenizer
        """Tokenizes the texts of a pair, which are truncated together afterwards."""
        self._pair_tokens = tokenizer.num_special_tokens_to_add(is_pair=True)
        self._special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
        self._places = cuts.places(tokenizer)
        self._takes_spans = POOLED_TOKENS in spec.heads
        self.spec = spec
        self.counted_characters = max(COUNTED_CHARACTERS, CHARACTERS_PER_TOKEN * spec.max_tokens)
        """Longer texts are cut before they are tokenized."""

    def encode(
        self,
        texts: Sequence[str],
        input_types: Sequence[str | None],
        seconds: Sequence[str] | None = None,
    ) -> list[Tokens]:
        """Prepend each text's prompt and tokenize it, as sentence-transformers does; in order.

        `seconds` are the second texts of pairs.

        Raises:
            UnknownInputType: the model has no prompt for an input type.
        """
        return self.encode_prompted(self.prompted(texts, input_types, seconds))

    def prompted(
        self,
        texts: Sequence[str],
        input_types: Sequence[str | None],
        seconds: Sequence[str] | None = None,
        spans_of_texts: np.ndarray | None = None,
    ) -> Sequence[Item]:
        """Prepend to each text the prompt of its input type; make pairs with `seconds`, if given,
        or texts with spans: `[texts, n, 2]` int64, in characters of each text.

        Raises:
            UnknownInputType: the model has no prompt for an input type.
        """
        firsts = [
            self.spec.prompt(input_type) + text
            for text, input_type in zip(texts, input_types, strict=True)
        ]
        if spans_of_texts is not None:
            return [
                spans.Spanned(
                    first, np.where(own == spans.NO_SPAN, 0, own + len(first) - len(text))
                )
                for first, text, own in zip(firsts, texts, spans_of_texts, strict=True)
            ]
        return firsts if seconds is None else list(zip(firsts, seconds, strict=True))

    def encode_prompted(self, prompted: Sequence[Item]) -> list[Tokens]:
        """Tokenize texts, or pairs of texts, that have their prompts already; in order."""
        if self._takes_spans:
            return self._encode_spanned(cast("Sequence[str | spans.Spanned]", prompted))
        if not self.spec.takes_pairs:
            return self._encode_texts(cast("Sequence[str]", prompted))
        if self.spec.template:
            return self._encode_chats(cast("Sequence[TextPair]", prompted))
        pairs = cast("list[TextPair]", [item for item in prompted if isinstance(item, tuple)])
        encoded_pairs = iter(self._encode_pairs(pairs))
        encoded_texts = iter(
            self._encode_texts([item for item in prompted if isinstance(item, str)])
        )
        return [
            next(encoded_pairs if isinstance(item, tuple) else encoded_texts) for item in prompted
        ]

    def _encode_spanned(self, items: Sequence[str | spans.Spanned]) -> list[Tokens]:
        """Tokenize texts with and without spans. Of a text that is truncated, spans may lack
        tokens: `spans.check_whole` finds it.
        """
        texts = iter(self._encode_texts([item for item in items if isinstance(item, str)]))
        return [
            next(texts)._replace(spans=spans.NONE) if isinstance(item, str) else self._spanned(item)
            for item in items
        ]

    def _spanned(self, item: spans.Spanned) -> Tokens:
        part = self._cut(item.text, self.counted_characters, self._places)
        encoding = self._tokenizer.encode(part)
        if len(part) < len(item.text) and self._tokens(encoding).total <= self.spec.max_tokens:
            encoding = self._tokenizer.encode(item.text)
        own = spans.tokens_of(encoding.offsets, item.spans)
        return self._tokens(encoding)._replace(spans=own)

    def _encode_chats(self, pairs: Sequence[TextPair]) -> list[Tokens]:
        """Tokenize pairs as texts of the spec's template, which end with its last tokens."""
        before, between, behind = self.spec.template
        last = self.spec.last_ids[-self.spec.max_tokens :]
        encoded = self._encode_texts(
            [f"{before}{first}{between}{second}{behind}" for first, second in pairs]
        )
        return [
            tokens._replace(ids=[*tokens.ids[: len(tokens.ids) - len(last)], *last])
            if tokens.total > self.spec.max_tokens
            else tokens
            for tokens in encoded
        ]

    def _encode_pairs(self, pairs: Sequence[TextPair]) -> list[Tokens]:
        """Tokenize pairs, the longer text of each truncated first. Equal texts are tokenized once:
        a query has many documents.
        """
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        parts = [self._cut(text, self.counted_characters, self._places) for text in distinct]
        encodings = self._whole.encode_batch(parts, add_special_tokens=False)
        by_text = dict(zip(distinct, encodings, strict=True))
        return [self._pair(by_text[first], by_text[second]) for first, second in pairs]

    def _pair(self, first, second) -> Tokens:  # type: ignore[no-untyped-def]
        joined = self._tokenizer.post_process(first, second)
        total = len(first) + len(second) + self._pair_tokens
        return Tokens(joined.ids, total, joined.type_ids if self.spec.token_types else None)

    def _encode_texts(self, prompted: Sequence[str]) -> list[Tokens]:
        if not prompted:
            return []
        parts = [self._cut(text, self.counted_characters, self._places) for text in prompted]
        return [
            self._tokens(encoding)
            if len(part) == len(text)
            else self._tokens_of_long(text, part, self._tokens(encoding))
            for text, part, encoding in zip(
                prompted, parts, self._tokenizer.encode_batch_fast(parts), strict=True
            )
        ]

    def _tokens_of_long(self, text: str, part: str, tokens: Tokens) -> Tokens:
        """The tokens of a longer part if `tokens`, those of `part`, are not above the limit.

        So a text of few tokens, such as white space alone, is tokenized as a whole.
        """
        while self._certain(part, tokens) <= self.spec.max_tokens and len(part) < len(text):
            part = self._cut(text, 2 * len(part), self._places)
            [encoding] = self._tokenizer.encode_batch_fast([part])
            tokens = self._tokens(encoding)
        return tokens

    def _certain(self, part: str, tokens: Tokens) -> int:
        """How many of the tokens of a part are the whole text's: all but those of the first word of
        a part that is the end of a text.
        """
        if not self._keeps_end:
            return tokens.total
        first_word = cuts.cut(part, 1, self._places)
        [encoding] = self._tokenizer.encode_batch_fast([first_word])
        return tokens.total - self._tokens(encoding).total

    def _tokens(self, encoding) -> Tokens:  # type: ignore[no-untyped-def]
        ids = encoding.ids
        # Every overflowing part has special tokens of its own.
        overflowing = sum(len(part) - self._special_tokens for part in encoding.overflowing)
        types = encoding.type_ids if self.spec.token_types else None
        return Tokens(ids, len(ids) + overflowing, types)


class LateTokenizer(TextTokenizer):
    """The tokenizer of a late-interaction model: queries and documents have a marker and a token
    limit of their own.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, late: LateSpec) -> None:
        super().__init__(tokenizer, spec)
        self._late, self._skipped = late, frozenset(late.skipped_ids)
        self._documents = _limited(tokenizer, spec, late.document_tokens, late.document_marker)
        self._queries = _limited(_copy(tokenizer), spec, late.query_tokens, late.query_marker)

    def prompted(
        self,
        texts: Sequence[str],
        input_types: Sequence[str | None],
        seconds: Sequence[str] | None = None,
        spans_of_texts: np.ndarray | None = None,
    ) -> Sequence[Item]:
        """Prepend to each text the prompt of its input type; make a Query of each query."""
        return [
            Query(text) if self.spec.is_query(input_type) else text
            for text, input_type in zip(
                cast("Sequence[str]", super().prompted(texts, input_types)),
                input_types,
                strict=True,
            )
        ]

    def encode_prompted(self, prompted: Sequence[Item]) -> list[Tokens]:
        """Tokenize queries and documents that have their prompts already; in order."""
        queries = [item.text for item in prompted if isinstance(item, Query)]
        documents = [item for item in prompted if isinstance(item, str)]
        encoded_queries = map(self._query, self._queries.encode_prompted(queries))
        encoded_documents = map(self._document, self._documents.encode_prompted(documents))
        return [
            next(encoded_queries if isinstance(item, Query) else encoded_documents)
            for item in prompted
        ]

    def _query(self, tokens: Tokens) -> Tokens:
        ids, total = _marked(tokens, self._late.query_marker)
        if self._late.expansion is None:
            return Tokens(ids, total, kept=[1] * len(ids))
        filled = max(0, self._late.query_tokens - len(ids))
        padding = self._late.padding_id
        ids = [self._late.expansion if token == padding else token for token in ids]
        ids += [self._late.expansion] * filled
        unattended = 0 if self._late.attends_to_expansion else filled
        return Tokens(ids, total, kept=[1] * len(ids), unattended=unattended)

    def _document(self, tokens: Tokens) -> Tokens:
        ids, total = _marked(tokens, self._late.document_marker)
        return Tokens(ids, total, kept=[int(token not in self._skipped) for token in ids])


def _limited(
    tokenizer: Tokenizer, spec: ModelSpec, max_tokens: int, marker: int | None
) -> TextTokenizer:
    """A tokenizer of plain texts that leaves room for a marker within `max_tokens`."""
    room = max_tokens - (marker is not None)
    return TextTokenizer(tokenizer, dataclasses.replace(spec, max_tokens=room, late=None))


def _marked(tokens: Tokens, marker: int | None) -> tuple[list[int], int]:
    """Ids and total with a marker behind the first token."""
    if marker is None:
        return tokens.ids, tokens.total
    return [*tokens.ids[:1], marker, *tokens.ids[1:]], tokens.total + 1


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def _without_truncation(tokenizer: Tokenizer) -> Tokenizer:
    copy = _copy(tokenizer)
    copy.no_truncation()
    return copy


def load(folder: Path, spec: ModelSpec) -> TextTokenizer:
    """Read `tokenizer.json` from a version folder of the repository.

    Raises:
        InvalidModel: the file is missing or is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE_NAME))
        if spec.late is not None:
            return LateTokenizer(tokenizer, spec, spec.late)
        return TextTokenizer(tokenizer, spec)
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"{FILE_NAME} cannot be read; build the model again") from error


def decode_all(values: Sequence[bytes | str], spec: ModelSpec) -> list[str]:
    """Decode the texts of one request.

    Raises:
        InvalidText: a text is not valid UTF-8, or is larger than `spec.max_text_bytes`.
        InvalidInput: the texts are together larger than MAX_REQUEST_BYTES.
    """
    _check_size(values)
    return [decode(value, row, spec) for row, value in enumerate(values)]


def decode_pairs(
    firsts: Sequence[bytes | str], seconds: Sequence[bytes | str], spec: ModelSpec
) -> tuple[list[str], list[str]]:
    """Decode the first and the second texts of the pairs of one request.

    Raises:
        InvalidText: as `decode_all`; the error's index is that of the pair.
        InvalidInput: the texts are together larger than MAX_REQUEST_BYTES.
    """
    _check_size([*firsts, *seconds])
    return (
        [decode(value, row, spec) for row, value in enumerate(firsts)],
        [decode(value, row, spec) for row, value in enumerate(seconds)],
    )


def _check_size(values: Sequence[bytes | str]) -> None:
    size_bytes = sum(map(len, values))
    if size_bytes > MAX_REQUEST_BYTES and len(values) > 1:
        raise InvalidInput(
            f"the {len(values)} texts have {size_bytes:,} bytes together; a request takes "
            f"{MAX_REQUEST_BYTES:,}. Send them in several requests."
        )


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
