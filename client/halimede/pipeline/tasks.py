"""What a call asks of a model: its inputs, its output, its options, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from halimede.inputs.content import KINDS, InputKind, ModelKind, OutputKind
from halimede.inputs.options import CallOptions
from halimede.providers.base import Answer
from halimede.results import (
    IMAGE,
    Classification,
    Embeddings,
    ImageInfo,
    MultiEmbeddings,
    Result,
    Scores,
    ServedModel,
    SparseEmbeddings,
)
from halimede_ops.errors import UnsupportedInput
from halimede_ops.quantise import quantise

R_co = TypeVar("R_co", bound=Result, covariant=True)


class Answered(NamedTuple):
    """The whole answer to a call, from one model."""

    answer: Answer
    model: ServedModel
    dims: int
    """Length of a vector."""
    options: CallOptions
    facts: Mapping[str, Any]
    """The fields of `Result`."""


@dataclasses.dataclass(frozen=True)
class Task(Generic[R_co]):
    """What one public method asks."""

    method: str
    """Name of the method, for messages."""
    kind: InputKind
    output: OutputKind
    result: Callable[[Answered], R_co]
    """Makes the result of an answer."""
    needs: str
    """The models that answer, for messages."""
    model_kind: ModelKind | None = None
    """The kind of the models that answer. None: every model that gives the output."""

    def check(self, provider: str, model: ServedModel) -> None:
        """Check that a model gives what this task asks.

        Raises:
            UnsupportedInput: it does not. The message says what the model is, and what to call.
        """
        if self.output in model.outputs and self.model_kind in (None, model.kind):
            return
        what, call = KINDS[model.kind]
        raise UnsupportedInput(
            f"{provider} is {what}; {self.method} needs {self.needs}. Call {call}, or name another "
            "model."
        )


def _embeddings(answered: Answered) -> Embeddings:
    answer, options = answered.answer, answered.options
    vectors = answer.vectors
    if options.output_type != "float32":
        vectors = quantise(vectors, options.output_type, options.ranges)
    return Embeddings(
        vectors, dims=answered.dims, output_type=options.output_type, **answered.facts
    )


def _image_embeddings(answered: Answered) -> Embeddings:
    return dataclasses.replace(_embeddings(answered), images=_image_infos(answered.answer))


def _image_infos(answer: Answer) -> tuple[ImageInfo, ...]:
    """Return the size and format of each row's image."""
    facts = np.zeros(len(answer.vectors), IMAGE) if answer.images is None else answer.images
    return tuple(ImageInfo(int(w), int(h), name.decode()) for w, h, name in facts.tolist())


def _sparse(answered: Answered) -> SparseEmbeddings:
    rows = answered.answer.vectors
    ids = tuple(row[0].astype(np.int32) for row in rows)
    return SparseEmbeddings(ids=ids, weights=tuple(row[1] for row in rows), **answered.facts)


def _multi(answered: Answered) -> MultiEmbeddings:
    return MultiEmbeddings(vectors=tuple(answered.answer.vectors), **answered.facts)


def _scores(answered: Answered) -> Scores:
    return Scores(scores=answered.answer.vectors[:, 0], **answered.facts)


def _classification(answered: Answered) -> Classification:
    return Classification(
        labels=answered.model.labels, scores=answered.answer.vectors, **answered.facts
    )


_DENSE, _SPARSE, _MULTI = "a dense model", "a model with sparse weights", "a multi-vector model"
_LATE_CHUNKING = "a model that was built with --late-chunking"
_RERANKER, _CLASSIFIER = "a reranker", "a classifier"
EMBED = Task("embed", "text", "vector", _embeddings, _DENSE)
EMBED_DOCUMENTS = dataclasses.replace(EMBED, method="embed_documents")
EMBED_IMAGES = Task("embed_images", "image", "vector", _image_embeddings, _DENSE)
EMBED_MULTIMODAL = Task("embed_multimodal", "pair", "vector", _image_embeddings, _DENSE)
EMBED_SPARSE = Task("embed_sparse", "text", "sparse", _sparse, _SPARSE)
EMBED_MULTI = Task("embed_multi", "text", "multi", _multi, _MULTI)
EMBED_SPANS = Task("embed_documents(late=True)", "text", "spans", _multi, _LATE_CHUNKING)
RANK = Task("rank", "text_pair", "scores", _scores, _RERANKER, "reranker")
SCORE = dataclasses.replace(RANK, method="score")
CLASSIFY = Task("classify", "text", "scores", _classification, _CLASSIFIER, "classifier")
CLASSIFY_PAIRS = dataclasses.replace(CLASSIFY, kind="text_pair")
