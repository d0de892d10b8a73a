"""What every provider is: the vocabulary that chain and providers share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from halimede.inputs.content import Content, InputKind, Pair
from halimede.results import UNKNOWN_TOKENS, ServedModel
from halimede_ops import errors
from halimede_ops import vectors as ops
from halimede_ops.errors import InvalidConfig, InvalidDimensions, UnknownInputType

REMOTE = "remote"
"""Precision of a provider that does not tell its own."""
DEFAULT_TIMEOUT_S = 30.0
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478"
    "9c63a8070000810080d394534a0000000049454e44ae426082"
)
"""A grey PNG of 1 × 1."""
METHODS: Mapping[InputKind, str] = {
    "text": "embed",
    "image": "embed_images",
    "pair": "embed_multimodal",
}
"""What an embedder's method for items of a kind is called."""
KINDS_BY_INPUT: Mapping[str, InputKind] = {"text": "text", "image": "image", "multimodal": "pair"}
"""InputKind of the items of a built model by its config's parameter `input`."""
PROBES: Mapping[InputKind, Content] = {
    "text": b"health",
    "image": PIXEL,
    "pair": Pair(b"health", PIXEL),
}
"""What is embedded to see whether a model can."""


class Request(NamedTuple):
    """What a provider is asked to embed at once."""

    items: Sequence[Content]
    """At most the model's `max_batch_size`."""
    kind: InputKind = "text"
    """What each item is."""
    input_type: str | None = None
    """Of texts: `query`, `document` or another prompt's name."""
    dimensions: int | None = None
    """Leading components to keep; None: as the model has."""
    sticky_key: bytes | None = None
    """What decides which of two versions answers all of it; None: each item for itself."""

    def part(self, rows: slice) -> Request:
        """The same of some items."""
        return self._replace(items=self.items[rows])

    def of(self, rows: np.ndarray) -> Request:
        """The same of the items at these places."""
        return self._replace(items=[self.items[row] for row in rows])


class Answer(NamedTuple):
    """One request's answer, and the model that gave it."""

    vectors: np.ndarray
    """`[items, dims]` float32."""
    tokens: np.ndarray
    """`[items]` int32; UNKNOWN_TOKENS where the provider does not tell."""
    model: ServedModel
    images: np.ndarray | None = None
    """`[items]` of `results.IMAGE`; None where the provider does not tell, and for texts."""
    versions: np.ndarray | None = None
    """`[items]` int64: version that gave each vector; None: `model`'s own, of all."""

    @property
    def made_by(self) -> np.ndarray:
        """`[items]` int64: version that gave each vector; 0: not told."""
        if self.versions is not None:
            return self.versions
        version = self.model.version
        number = int(version) if version.isdecimal() else 0
        return np.full(len(self.vectors), number, np.int64)

    def of(self, rows: np.ndarray) -> Answer:
        """The same of the items at these places."""
        return self._replace(
            vectors=self.vectors[rows],
            tokens=self.tokens[rows],
            images=None if self.images is None else self.images[rows],
            versions=self.made_by[rows],
        )


def joined(answers: Sequence[Answer]) -> Answer:
    """One answer of several, in their order, in the name of the last one's model."""
    told = [answer.images for answer in answers if answer.images is not None]
    return Answer(
        np.concatenate([answer.vectors for answer in answers]),
        np.concatenate([answer.tokens for answer in answers]),
        answers[-1].model,
        np.concatenate(told) if told else None,
        np.concatenate([answer.made_by for answer in answers]),
    )


class Provider(Protocol):
    """Something that embeds. Used on the client's event loop alone."""

    name: str
    """InputKind and model, for results, statistics and errors."""

    async def describe(self, timeout_s: float, kind: InputKind | None = None) -> ServedModel:
        """The model that embeds items of this kind, as it is now; None: the one that is named.

        Raises:
            UnsupportedInput: there is none.
        """
        ...

    async def embed(self, request: Request, timeout_s: float) -> Answer:
        """The answer to one request.

        Raises:
            UnsupportedInput: the provider embeds no items of this kind.
            HalimedeError: an error of halimede's tree, never one of an SDK.
        """
        ...

    async def health(self, timeout_s: float) -> None:
        """Nothing when the provider can embed now; else the error says why not."""
        ...

    async def close(self) -> None:
        """Give back connections and processes; a second call does nothing."""
        ...


class Options(BaseModel):
    """What a configuration says of one model; each provider adds its own keys."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    provider: str
    model_id: str
    """Name of the model, as the provider knows it."""
    dimensions: PositiveInt | None = None
    """Keep this many leading components unless a call says otherwise."""
    max_tokens: PositiveInt | None = None
    """Longest input in tokens, where the provider does not tell."""
    batch_size: PositiveInt | None = None
    """Most texts in one request; the provider's own limit if that is lower. Images go alone."""
    timeout_s: PositiveFloat = Field(DEFAULT_TIMEOUT_S, alias="timeout")
    """Longest wait for one request, in seconds."""
    retries: int = Field(2, ge=0)
    """Further tries of one request after an error that a retry can help."""
    requests_per_s: PositiveFloat | None = None
    """Most requests a second; None: no limit."""
    cache_enabled: bool = True
    cache_ttl_s: PositiveFloat | None = Field(None, alias="cache_ttl")
    """Seconds that a cached vector of this model lives at most; None: as the tiers say."""
    other_space: bool = False
    """Whether a chain may fall back to this model although its space is another."""

    MADE_FOR: ClassVar[str] = ""
    """InputKind of provider that these options are for."""


class KeyOptions(Options):
    """Options of a provider that wants a key: named, never given."""

    api_key_env: str | None = None
    """Environment variable that holds the key."""
    api_key_file: Path | None = None
    """File that holds the key."""

    def secret(self, default_env: str) -> str | None:
        """The key, from the file or the environment; None: there is none.

        Raises:
            InvalidConfig: the file or the variable that the configuration names is not there.
        """
        if self.api_key_file is not None:
            try:
                return self.api_key_file.read_text().strip()
            except OSError as error:
                raise InvalidConfig(f"api_key_file cannot be read: {error.strerror}.") from None
        found = os.environ.get(self.api_key_env or default_env)
        if found is None and self.api_key_env:
            raise InvalidConfig(f"the environment has no {self.api_key_env} (api_key_env).")
        return found


def texts(request: Request, provider: str) -> Sequence[bytes]:
    """The texts of a request.

    Raises:
        UnsupportedInput: it is not of texts.
    """
    check_texts(request.kind, provider)
    return cast(Sequence[bytes], request.items)


def check_texts(kind: InputKind | None, provider: str) -> None:
    """Nothing when items of this kind are texts.

    Raises:
        UnsupportedInput: they are not.
    """
    if kind not in (None, "text"):
        raise unsupported(kind, provider, "text")


def unsupported(kind: InputKind, provider: str, takes: InputKind) -> errors.UnsupportedInput:
    """The error of a provider that embeds items of another kind."""
    return errors.UnsupportedInput(
        f"{provider} embeds {takes}s, not {kind}s: call {METHODS[takes]}, or name another model."
    )


def too_late(provider: str, timeout_s: float) -> errors.DeadlineExceeded:
    """The error of a provider that did not answer in time."""
    return errors.DeadlineExceeded(
        f"{provider} did not answer within {timeout_s:g} s. Raise timeout, or send less at once."
    )


def unreachable(provider: str) -> errors.ServerUnreachable:
    """The error of a provider where nothing answers."""
    return errors.ServerUnreachable(f"{provider} cannot be reached. Is its url right, and up?")


def of_status(provider: str, status: int) -> errors.HalimedeError:
    """The error that an HTTP status stands for; the answer's own words may hold a text."""
    if status in (401, 403):
        return errors.AccessDenied(f"{provider} refuses the key, or wants one ({status}).")
    if status == 404:
        return errors.ModelNotFound(f"{provider} is not there (404).")
    if status == 429:
        return errors.ServerOverloaded(f"{provider} asks for fewer requests (429).")
    if status in (408, 504):
        return errors.DeadlineExceeded(f"{provider} took too long by its own limit ({status}).")
    if status >= 500:
        return errors.ServerError(f"{provider} failed ({status}). Send again later.")
    return errors.InvalidInput(
        f"{provider} refuses the request ({status}). A text may be empty or beyond the model's "
        "tokens, or an option unknown to it."
    )


def fingerprint(*facts: object) -> str:
    """16 hex digits that name a space by its facts."""
    joined = "\0".join(str(fact) for fact in facts)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def unknown_tokens(rows: int) -> np.ndarray:
    """Token counts `[rows]` int32 of a provider that tells none."""
    return np.full(rows, UNKNOWN_TOKENS, np.int32)


def matrix(rows: Any, count: int) -> np.ndarray:
    """Vectors `[count, dims]` float32 of an answer's lists.

    Raises:
        ServerError: there are not `count` rows of one length.
    """
    try:
        vectors = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise errors.ServerError("the provider's answer is not a list of vectors.") from None
    if vectors.ndim != 2 or len(vectors) != count:
        raise errors.ServerError(f"{count} texts were sent; the answer's shape is {vectors.shape}.")
    return vectors


def cut(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` components, of norm 1 again: `[rows, dim]` → `[rows, dimensions]`."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return ops.normalise(ops.truncate(vectors, dimensions))


def check_dimensions(dimensions: int | None, model: ServedModel) -> int:
    """`dimensions`, or the model's dims for None.

    Raises:
        InvalidDimensions: it lies outside 1 … the model's dims.
    """
    if dimensions is None:
        return model.dims
    if not 1 <= dimensions <= model.dims:
        raise InvalidDimensions(
            f"dimensions is {dimensions}; {model.name} gives 1 to {model.dims}."
        )
    return dimensions


def prompt(input_type: str | None, prompts: Mapping[str, str], model: str) -> str:
    """Text to put in front; `query` and `document` are always known and may be nothing.

    Raises:
        UnknownInputType: the model has no such prompt.
    """
    known = {"query": "", "document": "", **prompts}
    if not input_type:
        return ""
    if input_type not in known:
        raise UnknownInputType(
            f"the input type given is not one of {model}'s: {', '.join(sorted(known))}. "
            "Omit it for none."
        )
    return known[input_type]
