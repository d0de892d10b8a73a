"""The interface of a provider: requests, answers, configuration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from halimede.inputs.content import Content, InputKind, OutputKind
from halimede.pipeline.waiting import Future
from halimede.results import ServedModel
from halimede_ops.errors import HalimedeError

DEFAULT_TIMEOUT_S = 30.0


class Request(NamedTuple):
    """Inputs to embed, or to score, in one request."""

    inputs: Sequence[Content]
    """At most the model's `max_batch_size`."""
    kind: InputKind = "text"
    """Kind of every input."""
    input_type: str | None = None
    """For texts: `query`, `document` or the name of another prompt."""
    dimensions: int | None = None
    """Leading components to keep. None keeps all."""
    sticky_key: bytes | None = None
    """Key that decides whether a canary answers all inputs. None decides by each input."""
    model: ServedModel | None = None
    """The model to ask, as the provider described it. None: the provider's current one."""
    may_block: bool = False
    """Whether the caller's thread waits for this request alone: `embed` may then do the work in
    it, and return when it is done."""
    output: OutputKind = "vector"
    """What is asked for each input: one of the model's `outputs`."""

    def select(self, rows: slice | np.ndarray) -> Request:
        """Return the same request for some of its inputs, given a slice or `[n]` indices."""
        if isinstance(rows, slice):
            return self._replace(inputs=self.inputs[rows])
        return self._replace(inputs=[self.inputs[row] for row in rows])


class Answer(NamedTuple):
    """The answer to one request, with the model that gave it."""

    vectors: np.ndarray
    """`[inputs, dims]` float32: vectors, or scores. Of the outputs `sparse`, `multi` and `spans`
    `[inputs]` object: for each input a float32 array, `[2, n]` of token ids and their weights,
    `[n, width]` of vectors, or `[n, dims + 1]` of the vectors of spans and their weights, see
    `halimede_ops.spans.outputs`. `ragged` makes it."""
    tokens: np.ndarray
    """`[inputs]` int32. UNKNOWN_TOKENS where the provider does not count them."""
    model: ServedModel
    images: np.ndarray | None = None
    """`[inputs]` of `results.IMAGE`. None for texts, and where the provider does not know."""
    versions: np.ndarray | None = None
    """`[inputs]` int64: model version of each vector. None where it is `model.version` for all."""
    is_proven: bool = True
    """Whether the answer itself proves that `model` gave it. False: the model is described again,
    and the answer counts if it is still the same."""

    @property
    def row_versions(self) -> np.ndarray:
        """`[inputs]` int64: model version of each vector, 0 where it is unknown."""
        if self.versions is not None:
            return self.versions
        version = self.model.version
        number = int(version) if version.isdecimal() else 0
        return np.array([number] * len(self.vectors), np.int64)

    def select(self, rows: np.ndarray) -> Answer:
        """Return the answer for the inputs at `[n]` indices, in their order."""
        return self._replace(
            vectors=self.vectors[rows],
            tokens=self.tokens[rows],
            images=None if self.images is None else self.images[rows],
            versions=self.row_versions[rows],
        )


def ragged(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays of any shapes as one array `[rows]` of objects."""
    array = np.empty(len(rows), np.object_)
    for place, row in enumerate(rows):
        array[place] = row
    return array


def concatenate(answers: Sequence[Answer]) -> Answer:
    """Concatenate answers in their order. The model is that of the last one."""
    images = [answer.images for answer in answers if answer.images is not None]
    return Answer(
        np.concatenate([answer.vectors for answer in answers]),
        np.concatenate([answer.tokens for answer in answers]),
        answers[-1].model,
        np.concatenate(images) if images else None,
        np.concatenate([answer.row_versions for answer in answers]),
    )


@contextlib.contextmanager
def reindexed(rows: Sequence[int]) -> Iterator[None]:
    """Within a part of a request, raise an error about input `i` as one about input `rows[i]`."""
    try:
        yield
    except HalimedeError as error:
        if error.index is None:
            raise
        raise error.at(rows[error.index]) from None


class Provider(Protocol):
    """Something that embeds or scores. Its methods start work and return futures.

    They may be called from several threads. A method that has its result already returns
    `completed(result)`. One that needs to block does so in a thread of its own.
    """

    name: str
    """Kind and model, for results, statistics and errors."""

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Start to read the current model for inputs of this kind.

        None asks for the configured model. What a model gives is in its `kind` and `outputs`: the
        caller asks it for nothing else.

        Raises:
            UnsupportedInput: no model embeds this kind. As all errors, raised here or by the
                future.
        """
        ...

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Start to embed a request. The caller gives up after `timeout_s`, and cancels the future.

        Raises:
            UnsupportedInput: the provider does not embed inputs of this kind.
            ModelChanged: `request.model` is not the provider's model any more.
            HalimedeError: every other failure. An SDK's own error is never raised.
        """
        ...

    def close(self) -> None:
        """Release connections, threads and processes. A second call does nothing."""
        ...


class Options(BaseModel):
    """Configuration of one model. Each provider adds its own keys."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    provider: str
    """Kind of provider."""
    model_id: str
    """Name of the model at the provider."""
    dimensions: PositiveInt | None = None
    """Leading components to keep unless a call says otherwise."""
    max_tokens: PositiveInt | None = None
    """Token limit of a text, for providers that do not report it."""
    batch_size: PositiveInt | None = None
    """Maximum texts in one request, if below the provider's own limit. Images are sent alone."""
    timeout_s: PositiveFloat = Field(DEFAULT_TIMEOUT_S, alias="timeout")
    """Maximum wait for one request, in seconds."""
    retries: int = Field(2, ge=0)
    """Further attempts of a request after a temporary error."""
    requests_per_s: PositiveFloat | None = None
    """Maximum requests a second. None means no limit."""
    cache_enabled: bool = True
    """Whether vectors of this model are cached, where the configuration has a cache."""
    cache_ttl_s: PositiveFloat | None = Field(None, alias="cache_ttl")
    """Seconds that a vector of this model stays in the cache. None leaves it to the tiers."""
    other_space: bool = False
    """Allow fallback to this model although its space differs."""

    @property
    def refresh_s(self) -> float:
        """Age in seconds at which a model is described again, beside the calls."""
        return math.inf
