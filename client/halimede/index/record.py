"""The record beside a collection's vectors: which space they have."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import Self

from halimede.results import Embeddings
from halimede_ops.errors import InvalidInput, SpaceRefused

FORMAT = 1
KEY = "halimede"
"""Key of the record in a collection's metadata."""
COMPARED = ("space", "precision", "dims", "output_type")
"""Fields that decide whether two vectors can be compared."""


@dataclasses.dataclass(frozen=True)
class SpaceRecord:
    """Space, precision and form of vectors."""

    space: str
    """Fingerprint of weights, tokenizer, pooling, head, prompts and dims."""
    precision: str
    """fp32, fp16 or int8. `remote` if the provider does not report it."""
    dims: int
    """Components of each vector."""
    output_type: str = "float32"
    model: str = ""
    """Name of the model. For people: it is not compared."""

    @classmethod
    def of(cls, result: Embeddings) -> Self:
        """Return the record of a result.

        Raises:
            InvalidInput: it is not `Embeddings`.
        """
        if not isinstance(result, Embeddings):
            raise InvalidInput(
                f"{type(result).__name__} does not say its space; give the Embeddings that an "
                "embedder returns."
            )
        fields = (result.space, result.precision, result.dims, result.output_type, result.model)
        return cls(*fields)

    @classmethod
    def from_json(cls, text: str, owner: str) -> Self:
        """Return the record that `to_json` wrote; `owner` names its collection in errors.

        Raises:
            InvalidInput: it is damaged, or of a later version of halimede.
        """
        try:
            facts = json.loads(text)
            version = int(facts.pop("format"))
            if version == FORMAT:
                record = cls(**facts)
                texts = (record.space, record.precision, record.output_type, record.model)
                if all(isinstance(value, str) for value in texts) and isinstance(record.dims, int):
                    return record
        except (ValueError, TypeError, KeyError, AttributeError):
            version = FORMAT
        if version > FORMAT:
            raise InvalidInput(
                f"{owner} has a record of format {version}; this halimede reads {FORMAT}. Update "
                "halimede."
            )
        raise InvalidInput(
            f"{owner} has a damaged record. Write a new one: `halimede index adopt --replace`."
        )

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)

    def digest(self) -> str:
        """Return 16 hex digits that are equal for records of comparable vectors."""
        facts = json.dumps([getattr(self, name) for name in COMPARED])
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()

    def is_alike(self, other: SpaceRecord, precisions: Collection[str] = ()) -> bool:
        """Whether vectors of both can be compared.

        `precisions` are accepted from the other beside the own one.
        """
        accepted = dataclasses.replace(other, precision=self.precision)
        return self.digest() == (accepted if other.precision in precisions else other).digest()

    def check(
        self, other: SpaceRecord, owner: str, given: str, precisions: Collection[str] = ()
    ) -> None:
        """Check that other vectors can be compared with those of this record.

        `owner` and `given` name both in errors.

        Raises:
            SpaceRefused: they cannot.
        """
        if self.is_alike(other, precisions):
            return
        raise SpaceRefused(
            f"{owner} has vectors of {self}; {given} has {other}. Use {self.model or 'its model'}, "
            "or re-embed the collection: `halimede index plan`."
        )

    def __str__(self) -> str:
        name = f"{self.model}, " if self.model else ""
        return f"{name}space {self.space}, {self.precision}, {self.dims} dims, {self.output_type}"
