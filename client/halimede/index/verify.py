"""Whether a collection's vectors are those of a model: some of its own texts are embedded again."""

from __future__ import annotations

from halimede.embedder import Embedder
from halimede.index.record import SpaceRecord
from halimede.index.stores.base import Store
from halimede_ops import vectors
from halimede_ops.errors import InvalidInput, SpaceRefused

SAMPLE = 32
MIN_COSINE = 0.999
"""Lowest mean cosine of stored and new vectors. INT8 has 0.998 to FP32, FP16 0.99996."""


def verify(
    store: Store,
    embedder: Embedder,
    *,
    input_type: str | None = None,
    dimensions: int | None = None,
) -> SpaceRecord:
    """Return the record of a model's vectors after a comparison with those of the collection.

    Raises:
        SpaceRefused: they differ.
        InvalidInput: the collection has no texts to embed.
    """
    sample = store.sample(SAMPLE)
    rows = [row for row in range(len(sample)) if sample.text(row)]
    if not rows or sample.vectors is None:
        raise InvalidInput(
            f"{store.name} has no texts to embed again. Give a result or a record to adopt "
            "unverified: `guard.adopt(result)`, `halimede index adopt --unverified`."
        )
    texts = [str(sample.text(row)) for row in rows]
    width = sample.vectors.shape[1]
    if dimensions is None and width < embedder.model.dims:
        dimensions = width
    result = embedder.embed(texts, input_type=input_type, dimensions=dimensions)
    if result.dims != width:
        raise SpaceRefused(
            f"{store.name} has vectors of {width} values; {result.model} has {result.dims}."
        )
    cosine = float(vectors.cosine(result.vectors, sample.vectors[rows]).mean())
    if not cosine >= MIN_COSINE:
        raise SpaceRefused(
            f"{store.name} has other vectors than {result.model} ({result.precision}) gives for "
            f"its texts: their mean cosine is {cosine:.4f} in {len(rows)} rows, and must be "
            f"{MIN_COSINE}. Give the model, or the --input-type, that made them."
        )
    return SpaceRecord.of(result)
