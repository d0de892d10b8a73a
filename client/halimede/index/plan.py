"""What it takes to re-embed a collection: rows, time and cost at the measured rate."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede.index.record import SpaceRecord
from halimede.index.stores.base import Store
from halimede.results import UNKNOWN_TOKENS, Embeddings
from halimede_ops.errors import InvalidInput

EXTRA = "bulk"
SAMPLE = 512
"""Texts that are embedded to measure the rate."""
WARM_UP = 8
"""Texts that are embedded before, so that a model is loaded and a connection open."""


@dataclasses.dataclass(frozen=True)
class Price:
    """What embedding costs: by time, by tokens, or neither."""

    per_hour: float | None = None
    per_million_tokens: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A re-embedding that has not begun."""

    store: str
    rows: int
    """Rows of the collection, or of the texts given."""
    record: SpaceRecord | None
    """Record of the collection. None: it has none."""
    target: SpaceRecord
    """Record of the new vectors."""
    sampled: int
    """Texts that were embedded to measure the rate."""
    texts_per_s: float
    seconds: float
    """Time for all rows at this rate."""
    tokens: int | None
    """Tokens of all rows, as those of the sample. None: the provider does not count them."""
    cost: float | None
    """In the currency of the price. None: no price is given."""

    @property
    def is_needed(self) -> bool:
        """Whether the collection is of another space than the model."""
        return self.record is None or not self.record.is_alike(self.target)

    def facts(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {**dataclasses.asdict(self), "is_needed": self.is_needed}


def plan(
    store: Store,
    embedder: Embedder,
    *,
    texts: Sequence[str] = (),
    sample: int = SAMPLE,
    price: Price | None = None,
    input_type: str | None = None,
    dimensions: int | None = None,
) -> Plan:
    """Return the plan of a re-embedding with the model of this embedder.

    Embeds a sample of the collection's own texts, once, and measures how long it takes.

    Args:
        store: the collection.
        embedder: its model gives the new vectors.
        texts: files with the columns `id` and `text`, as `halimede bulk` reads them, of a store
            that keeps none.
        sample: texts to embed.
        price: what embedding costs.
        input_type: that of the collection's texts, such as `document`.
        dimensions: as for `embed`.

    Raises:
        InvalidInput: the collection has no texts, or the price is of tokens and the provider does
            not count them.
        HalimedeError: the texts cannot be embedded.
    """
    rows, sampled = _texts_of_files(texts, sample) if texts else _texts_of(store, sample)
    if not sampled:
        raise InvalidInput(f"{store.name} has no texts to embed.")
    options: dict[str, Any] = {"input_type": input_type, "dimensions": dimensions}
    result, rate = _measure(embedder, sampled, options)
    tokens = _tokens(result, rows)
    seconds = rows / rate
    return Plan(
        store=store.name,
        rows=rows,
        record=store.read(),
        target=SpaceRecord.of(result),
        sampled=len(sampled),
        texts_per_s=round(rate, 1),
        seconds=round(seconds, 1),
        tokens=tokens,
        cost=None if price is None else _cost(price, seconds, tokens),
    )


def _measure(
    embedder: Embedder, texts: Sequence[str], options: Mapping[str, Any]
) -> tuple[Embeddings, float]:
    """Embed texts, and return the result and the texts a second."""
    embedder.embed(texts[:WARM_UP], **options)
    began = time.perf_counter()
    result = embedder.embed(texts, **options)
    return result, _new_rows(result) / (time.perf_counter() - began)


def _tokens(result: Embeddings, rows: int) -> int | None:
    """Return the tokens that so many rows have, if all are like those of a result."""
    known = result.tokens[result.tokens != UNKNOWN_TOKENS]
    if not len(known):
        return None
    return round(float(np.minimum(known, result.max_tokens).mean()) * rows)


def _texts_of(store: Store, count: int) -> tuple[int, list[str]]:
    """Return the rows of a collection, and some of its texts."""
    page = store.sample(count)
    return store.count(), [text for text in page.texts or () if text]


def _texts_of_files(sources: Sequence[str], count: int) -> tuple[int, list[str]]:
    """Return the rows of files, and some of their texts."""
    pyarrow = import_optional("pyarrow", EXTRA)
    from halimede.bulk import BulkOptions
    from halimede.bulk.plan import plan as plan_files
    from halimede.bulk.rows import SUFFIXES, TEXT, open_rows
    from halimede.bulk.storage import expand

    places = expand(sources, SUFFIXES)
    options = BulkOptions(text_column=TEXT, rows_per_file=max(1, count))
    records, _ = plan_files(places, options)
    sampled: list[str] = []
    for place, record in zip(places, records, strict=True):
        if record.parts and len(sampled) < count:
            with contextlib.closing(open_rows(place)) as rows:
                schema = pyarrow.schema([rows.content(TEXT, is_image=False)])
                table = rows.read(record.parts[0], schema, TEXT).table
            sampled += [text for text in table.column(0).to_pylist() if text]
    return sum(record.rows for record in records), sampled[:count]


def _new_rows(result: Embeddings) -> int:
    """Return the rows that the model embedded, not a cache.

    Raises:
        InvalidInput: all came from a cache.
    """
    rows = len(result) - int(np.count_nonzero(result.cached))
    if not rows:
        raise InvalidInput(
            "every text of the sample is in the cache, so no rate can be measured. Give a "
            "configuration without a cache."
        )
    return rows


def _cost(price: Price, seconds: float, tokens: int | None) -> float | None:
    cost = None
    if price.per_hour is not None:
        cost = price.per_hour * seconds / 3600
    if price.per_million_tokens is not None:
        if tokens is None:
            raise InvalidInput(
                "a price of tokens is given, and the provider does not count tokens. Give a price "
                "of an hour."
            )
        cost = (cost or 0.0) + price.per_million_tokens * tokens / 1e6
    return cost if cost is None else round(cost, 6)
