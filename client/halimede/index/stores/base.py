"""What a store of vectors gives to the guard."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from halimede.index.record import SpaceRecord
from halimede_ops.errors import InvalidInput

PACKED = ("binary", "ubinary")
"""Output types of eight components a byte."""


class Match(NamedTuple):
    """A row that a query gave."""

    id: Any
    score: float
    """The store's own figure: a similarity in Qdrant, a distance elsewhere."""
    text: str | None = None
    fields: Mapping[str, Any] = {}
    """What else the row has: payload, metadata, columns."""


@dataclasses.dataclass(frozen=True)
class Page:
    """Some rows of a collection."""

    ids: Sequence[Any]
    texts: Sequence[str | None] | None = None
    fields: Sequence[Mapping[str, Any] | str] | None = None
    """For each row what else it has; a string is JSON."""
    vectors: np.ndarray | None = None
    """`[rows, width]`."""

    def __post_init__(self) -> None:
        for name in ("texts", "fields", "vectors"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.ids):
                raise InvalidInput(
                    f"{name} has {len(column)} rows and ids has {len(self.ids)}; give as many."
                )

    def __len__(self) -> int:
        return len(self.ids)

    def text(self, row: int) -> str | None:
        """Return the text of a row. None: it has none."""
        return None if self.texts is None else self.texts[row]

    def field(self, row: int) -> Mapping[str, Any]:
        """Return the fields of a row."""
        fields: Mapping[str, Any] | str = {} if self.fields is None else self.fields[row]
        return json.loads(fields) if isinstance(fields, str) else fields


class Store(Protocol):
    """A collection of vectors, with its record."""

    @property
    def name(self) -> str:
        """Kind and name of the collection, for messages."""
        ...

    @property
    def keeps_texts(self) -> bool:
        """Whether it keeps texts and fields beside the vectors."""
        ...

    @property
    def fields_type(self) -> Any:
        """Arrow type of a row's fields in an export. None: they are JSON."""
        ...

    @property
    def packed(self) -> Sequence[str]:
        """Output types of packed bits that it keeps."""
        ...

    def refresh(self) -> None:
        """See what other writers have done. Called before a write."""
        ...

    def read(self) -> SpaceRecord | None:
        """Return the record. None: there is none.

        Raises:
            InvalidInput: it is damaged.
        """
        ...

    def claim(self, record: SpaceRecord) -> SpaceRecord:
        """Write the record if there is none, and return the record that is there now.

        Of several writers at the same time, at most those of one record get it returned.

        Raises:
            SpaceRefused: another writer claims the collection at the same time.
        """
        ...

    def replace(self, record: SpaceRecord) -> None:
        """Write the record over the one that is there. Other metadata stays."""
        ...

    def count(self) -> int:
        """Return the number of rows."""
        ...

    def width(self) -> int | None:
        """Return the values of each vector. None: the collection does not fix it yet."""
        ...

    def write(self, page: Page) -> None:
        """Write rows with vectors. A row whose id is there is replaced."""
        ...

    def query(self, vectors: np.ndarray, k: int) -> list[list[Match]]:
        """Return the `k` best rows for each vector, the best first."""
        ...

    def pages(self, size: int) -> Iterator[Page]:
        """Iterate over all rows, without vectors.

        Raises:
            InvalidInput: the store keeps no texts.
        """
        ...

    def sample(self, count: int) -> Page:
        """Return at most `count` rows with vectors, drawn from the whole collection.

        Raises:
            InvalidInput: the store keeps no texts.
        """
        ...

    def created(self, name: str, record: SpaceRecord) -> AbstractContextManager[Store]:
        """Return a context that gives a new collection like this one, to be filled.

        What can be is copied: distance, options, metadata, other columns. A collection of this
        name and record that is there is given as it is. PostgreSQL and FAISS keep what is written
        only if the context ends without an error.

        Raises:
            SpaceRefused: it is there, with vectors of another space.
            InvalidInput: such a collection cannot be made.
        """
        ...

    def close(self) -> None:
        """Close the client if `open_store` opened it. A client of the caller stays open."""
        ...


def existing_folder(place: str, kind: str) -> str:
    """Return the path of a folder.

    Raises:
        InvalidInput: it is none.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise InvalidInput(f"{place} is no folder of {kind}.")
    return str(folder)
