"""What a model is given: texts, images and pairs, as bytes or as inputs that are read later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

InputKind = Literal["text", "image", "pair", "text_pair"]
"""A text, an image, a text and an image that are embedded as one vector, or two texts that are
scored together."""
OutputKind = Literal["vector", "scores", "sparse", "multi", "spans"]
"""What is asked for an input: one vector; scores; weights of tokens; a vector for each token; or
one for each span of a text."""

METHODS: Mapping[InputKind, str] = {
    "text": "embed",
    "image": "embed_images",
    "pair": "embed_multimodal",
    "text_pair": "Reranker.rank",
}
"""The method for each kind, of `Embedder` where no class is named."""
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)
TEXT_KINDS: tuple[InputKind, ...] = ("text", "text_pair")
"""Kinds of which many inputs are sent together. The others are read one by one."""
ModelKind = Literal["dense", "reranker", "classifier", "sparse", "late_interaction"]
"""What a model is: it gives a vector, a score of relevance, a score for each label, weights of
tokens, or a vector for each token."""
KINDS: Mapping[ModelKind, tuple[str, str]] = {
    "dense": ("a dense embedding model", "Embedder.embed"),
    "reranker": ("a reranker", "Reranker.rank or Reranker.score"),
    "classifier": ("a classifier", "Classifier.classify"),
    "sparse": ("a sparse embedding model", "Embedder.embed_sparse"),
    "late_interaction": ("a late-interaction model", "Embedder.embed_multi"),
}
"""Kind of a model → what it is, and the method that asks it."""
OUTPUT_OF: Mapping[ModelKind, OutputKind] = {
    "dense": "vector",
    "reranker": "scores",
    "classifier": "scores",
    "sparse": "sparse",
    "late_interaction": "multi",
}
"""Kind of a model → its own output. A dense model may have heads that give further ones."""
RAGGED: tuple[OutputKind, ...] = ("sparse", "multi", "spans")
"""Outputs whose size differs from input to input."""


class Pair(NamedTuple):
    """A text and an image that are embedded as one vector. Either may be None."""

    text: bytes | None
    """UTF-8."""
    image: bytes | None
    """The encoded file."""


class TextPair(NamedTuple):
    """Two texts that are scored together: a query and a document, or a text and a second one."""

    first: bytes
    """UTF-8."""
    second: bytes
    """UTF-8."""


class SpannedText(NamedTuple):
    """A text whose spans are embedded, each with the whole text as its context."""

    text: bytes
    """UTF-8."""
    spans: bytes
    """`[spans, 2]` int32, little endian: start and end of each span, in characters of the text."""


Content = bytes | Pair | TextPair | SpannedText
"""A UTF-8 text, an encoded image file, or a pair, as its InputKind says. For the output `spans` a
text with its spans."""


class ReadOptions(NamedTuple):
    """How lazy inputs are read."""

    max_bytes: int
    """Largest image allowed, in bytes."""
    fetch: Callable[[str, int], bytes]
    """Returns the content of a URL, at most the given number of bytes. Blocks."""


@runtime_checkable
class LazyInput(Protocol):
    """An input that is read just before it is sent, so that a large call stays small in memory."""

    @property
    def memory_bytes(self) -> int:
        """Bytes that the input holds in memory before it is read."""
        ...

    def read(self, options: ReadOptions) -> Content:
        """Return the content. It may block.

        Raises:
            InvalidInput: it cannot be read, or is too large.
        """
        ...


Input = bytes | TextPair | SpannedText | LazyInput
"""One input of a call."""


def plural(kind: InputKind) -> str:
    """The word for several inputs of a kind, such as `text pairs`."""
    return f"{kind.replace('_', ' ')}s"


def memory_bytes(value: Input) -> int:
    """Bytes that an input holds in memory."""
    is_content = isinstance(value, (bytes, TextPair, SpannedText))
    return size_bytes(value) if is_content else value.memory_bytes  # type: ignore[arg-type, union-attr]


def size_bytes(content: Content) -> int:
    """Bytes of a content: of a pair, those of both parts."""
    return len(content) if isinstance(content, bytes) else sum(len(part or b"") for part in content)


def serialise(content: Content) -> bytes:
    """Bytes that differ between any two contents of one kind, for hashes and cache keys."""
    if isinstance(content, bytes):
        return content
    return b"".join(map(length_prefixed, content))


def length_prefixed(field: bytes | None) -> bytes:
    """The field behind its length as 8 bytes, little endian. None differs from an empty field."""
    if field is None:
        return b"\xff" * 8
    return len(field).to_bytes(8, "little") + field
