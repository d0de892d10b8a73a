"""Vectors of a window: one call of an embedder, whatever the window has."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tenacity

from halimede.bulk.manifest import BulkOptions, ModelRecord
from halimede.bulk.windows import Span, Vectors, Window
from halimede.embedder import Embedder
from halimede.results import Embeddings
from halimede_ops.errors import (
    InvalidInput,
    NonFiniteVector,
    ServerError,
    SpaceRefused,
)
from halimede_ops.quantise import OutputType

PATIENCE_S = 600
"""A server that cannot answer is asked again for so long, beside the retries of a request."""
LONGEST_WAIT_S = 30


class WindowEmbedder:
    """Embeds windows with the options of a job. Safe to use from several threads."""

    def __init__(self, embedder: Embedder, options: BulkOptions, model: ModelRecord) -> None:
        self._embedder = embedder
        self._options = options
        self._model = model
        self._facts: dict[str, Any] = {
            "dimensions": options.dimensions,
            "output_type": options.output_type,
            "ranges": None if options.ranges is None else np.array(options.ranges, np.float32),
        }
        if options.text_column is not None:
            self._facts["input_type"] = options.input_type
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, ServerError) and error.retryable
            ),
            wait=tenacity.wait_exponential(max=LONGEST_WAIT_S),
            stop=tenacity.stop_after_delay(PATIENCE_S),
            reraise=True,
        )

    def embed(self, window: Window) -> Vectors:
        """Embed the rows of a window that have no error yet.

        Raises:
            HalimedeError: a row has an error, and the job does not collect errors; or the model
                cannot be used.
            SpaceRefused: the model has another space or precision than that of the job.
        """
        collects = self._options.errors == "collect"
        errors = dict(window.errors)
        if errors and not collects:
            raise InvalidInput(f"{next(iter(errors.values()))} Give --errors collect to go on.")
        rows = [row for row in range(len(window.values)) if row not in errors]
        while rows:
            try:
                result = self._retrying(self._call, [window.values[row] for row in rows])
            except (InvalidInput, NonFiniteVector) as error:
                if error.index is None:
                    raise
                failed = _rows_of(error.index, rows, window)
                located = error.at(window.rows[failed[0]])
                if not collects:
                    raise located from None
                errors |= dict.fromkeys(failed, str(located))
                rows = [row for row in rows if row not in errors]
                continue
            for place, left_out in result.errors.items():
                errors[rows[place]] = str(left_out.at(window.rows[rows[place]]))
            embedded = rows if self._options.late else [rows[i] for i in result.indices]
            return _vectors(len(window.values), embedded, result, errors)
        count = len(window.values)
        shape = count, width_of(self._model.dims, self._options.output_type)
        nothing = np.zeros(shape, value_type(self._options.output_type))
        return Vectors(nothing, np.zeros(count, np.int32), np.zeros(count, np.bool_), errors)

    def _embed_spans(self, spans: Sequence[Span]) -> Embeddings:
        """Embed spans, each from one pass over its whole text."""
        documents = _documents(spans)
        return self._embedder.embed_documents(
            [own[0].text for own in documents],
            spans=[[(span.start, span.end) for span in own] for own in documents],
            late=True,
            **self._facts,
        )

    def _call(self, values: Sequence[Any]) -> Embeddings:
        options = self._options
        if options.late:
            result = self._embed_spans(values)
        elif options.image_column is None:
            result = self._embedder.embed(values, **self._facts)
        elif options.text_column is None:
            result = self._embedder.embed_images(values, errors=options.errors, **self._facts)
        else:
            texts, images = [text for text, _ in values], [image for _, image in values]
            result = self._embedder.embed_multimodal(
                texts, images, errors=options.errors, **self._facts
            )
        ours, theirs = self._model, result
        if (ours.space, ours.precision) != (theirs.space, theirs.precision):
            raise SpaceRefused(
                f"the job has vectors of space {ours.space}, {ours.precision}; {theirs.model} now "
                f"has {theirs.space}, {theirs.precision}. Serve the model of the job again, or "
                "begin a job with another --out."
            )
        return result


def _documents(values: Sequence[Any]) -> list[list[Span]]:
    """Return the spans of each whole text: those of one text follow each other."""
    return [list(own) for _, own in itertools.groupby(values, key=lambda span: id(span.text))]


def _rows_of(index: int, rows: Sequence[int], window: Window) -> list[int]:
    """Return the rows that an error about input `index` of a call is about."""
    values = [window.values[row] for row in rows]
    if not isinstance(values[0], Span):
        return [rows[index]]
    groups = _documents(values)
    first = sum(map(len, groups[:index]))
    return list(rows[first : first + len(groups[index])])


def value_type(output_type: OutputType) -> np.dtype[Any]:
    """Return the type of the values in a written vector."""
    return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(output_type, output_type))


def width_of(dims: int, output_type: str) -> int:
    """Return the number of values in a written vector."""
    return dims // 8 if output_type in ("binary", "ubinary") else dims


def _vectors(
    count: int, rows: Sequence[int], result: Embeddings, errors: Mapping[int, str]
) -> Vectors:
    """Return the vectors of a window of `count` rows, of which these are embedded."""
    versions = frozenset(map(int, np.unique(result.versions)))
    truncated = (result.tokens > result.max_tokens) & (result.max_tokens > 0)
    if len(rows) == count:
        return Vectors(result.vectors, result.tokens, truncated, errors, versions)
    vectors = np.zeros((count, result.vectors.shape[1]), result.vectors.dtype)
    tokens, is_cut = np.zeros(count, np.int32), np.zeros(count, np.bool_)
    vectors[rows], tokens[rows], is_cut[rows] = result.vectors, result.tokens, truncated
    return Vectors(vectors, tokens, is_cut, errors, versions)
