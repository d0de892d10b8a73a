"""Which store a collection is of: from its own client, or from an address as text."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halimede.index.stores.base import Store
from halimede_ops.errors import InvalidInput

FORMS = (
    "qdrant:FOLDER#COLLECTION, qdrant:http://HOST:PORT#COLLECTION, chroma:FOLDER#COLLECTION, "
    "chroma:http://HOST:PORT#COLLECTION, lancedb:FOLDER#TABLE, postgresql://…#TABLE or faiss:FILE"
)
"""Addresses that are understood."""
FILES = "halimede.index.stores"


class Kind(NamedTuple):
    """A kind of store."""

    module: str
    """Its file here."""
    package: str
    """Package of its client."""


KINDS = {
    "qdrant": Kind("qdrant", "qdrant_client"),
    "chroma": Kind("chroma", "chromadb"),
    "lancedb": Kind("lancedb", "lancedb"),
    "postgresql": Kind("pgvector", "psycopg"),
    "faiss": Kind("faiss", "faiss"),
}
"""Beginning of an address → store."""


def recognise(collection: Any, name: str | None, options: Mapping[str, str]) -> Store:
    """Return the store of a client's object, a path or an address.

    Raises:
        InvalidInput: it is of no known store, or its name is missing.
    """
    if isinstance(collection, (str, os.PathLike)):
        address = os.fspath(collection)
        if re.match(r"[a-z]{2,}:", address):  # not a drive of Windows
            return open_store(address if name is None else f"{address}#{name}", options)
        return open_store(f"faiss:{address}", options)
    packages = {base.__module__.partition(".")[0] for base in type(collection).__mro__}
    for kind in KINDS.values():
        if kind.package in packages:
            module = importlib.import_module(f"{FILES}.{kind.module}")
            return module.of(collection, name, **_known(module.OPTIONS, options))
    raise InvalidInput(
        f"{type(collection).__name__} is no collection that halimede.guard knows; give a client "
        "of Qdrant, Chroma, LanceDB or psycopg, or the path of a FAISS index."
    )


def open_store(address: str, options: Mapping[str, str] | None = None) -> Store:
    """Return the store at an address, such as `lancedb:data#articles`.

    Options are `id_field`, `text_field` and `vector_field`, where these are not the usual ones.

    Raises:
        InvalidInput: it is no address, or there is no such collection.
        MissingExtra: the store's client is not installed.
    """
    scheme, colon, rest = address.partition(":")
    kind = KINDS.get("postgresql" if scheme == "postgres" else scheme)
    if not colon or kind is None:
        raise InvalidInput(f"{scheme}{colon} is no store; give {FORMS}.")
    module = importlib.import_module(f"{FILES}.{kind.module}")
    known = _known(module.OPTIONS, options or {})
    if kind.module == "faiss":
        return module.of(Path(rest), None, **known)
    place, hash_sign, name = rest.rpartition("#")
    if not hash_sign or not place or not name:
        raise InvalidInput(f"the address has no collection or table; give {FORMS}.")
    return module.connect(
        f"{scheme}:{place}" if kind.module == "pgvector" else place, name, **known
    )


def _known(names: tuple[str, ...], options: Mapping[str, str]) -> dict[str, str]:
    for option in options:
        if option not in names:
            raise InvalidInput(
                f"option {option!r} is not one of this store; it has {', '.join(names) or 'none'}."
            )
    return dict(options)
