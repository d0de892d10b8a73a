"""A collection into another space: export, embed, load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halimede.embedder import Embedder
from halimede.extras import import_optional
from halimede.index.export import EXTRA, FIELDS, ID, TEXT, export
from halimede.index.load import Loaded, load
from halimede.index.stores.base import Store

if TYPE_CHECKING:
    from halimede.bulk import BulkOptions, Done

TEXTS, VECTORS = "texts", "vectors"
"""Folders of the work."""


def reembed(
    store: Store,
    name: str,
    embedder: Embedder,
    folder: Path,
    *,
    texts: Sequence[str] = (),
    input_type: str | None = None,
    dimensions: int | None = None,
    on_progress: Callable[[Done], None] = lambda done: None,
) -> Loaded:
    """Write a new collection that has the texts of this one, with the vectors of another model.

    The old collection stays as it is. What was ended goes on where it stopped, with the same
    folder.

    Args:
        store: the old collection.
        name: collection, table or index file to write.
        embedder: its model gives the new vectors.
        folder: texts and vectors between the steps. It can be deleted after.
        texts: files with the columns `id` and `text`, of a store that keeps none.
        input_type: that of the collection's texts, such as `document`.
        dimensions: as for `embed`.
        on_progress: called as rows are embedded.

    Raises:
        InvalidInput: a row has no text, or the new collection cannot be made.
        SpaceRefused: the new collection, or the folder, has vectors of another space.
    """
    import_optional("pyarrow", EXTRA)
    from halimede import bulk

    if not texts:
        export(store, folder / TEXTS)
    options = bulk_options(store, input_type, dimensions)
    sources = list(texts) or [str(folder / TEXTS)]
    out = str(folder / VECTORS)
    bulk.run(embedder, sources, out, options, on_progress=on_progress)
    return load(store, name, out)


def bulk_options(store: Store, input_type: str | None, dimensions: int | None) -> BulkOptions:
    """Return what a job of `halimede bulk` keeps, so that its vectors can be loaded."""
    from halimede.bulk import BulkOptions

    return BulkOptions(
        text_column=TEXT,
        id_column=ID,
        keep=(TEXT, FIELDS) if store.keeps_texts else (),
        input_type=input_type,
        dimensions=dimensions,
    )
