"""LanceDB: an embedding function that tables keep by its name, `halimede`.

Needs the extra `index-lancedb`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from halimede.embedder import Embedder
from halimede.extras import needs_extra
from halimede.integrations.clients import open_embedder

with needs_extra("index-lancedb"):
    from lancedb.embeddings import TextEmbeddingFunction, register


@register("halimede")  # type: ignore[no-untyped-call]
class HalimedeEmbeddingFunction(TextEmbeddingFunction):
    """Embeds a table's texts and the queries to it. The table keeps these fields, and no vectors of
    another model.
    """

    model: str | None = None
    """Name of a served model, or of a model in the configuration. Default: as for `Embedder`."""
    url: str | None = None
    """Address of the server, as for `Embedder`."""
    config: dict[str, Any] | str | None = None
    """Configuration, or the path of its file, as for `Embedder`."""
    dimensions: int | None = None
    """Leading components to keep, normalised again."""
    max_retries: int = 0
    """Further attempts by LanceDB. The client retries what can succeed itself."""

    def ndims(self) -> int:
        """Components of a vector."""
        return self.dimensions or self._embedder.model.dims

    def compute_query_embeddings(self, query: str, *_: Any, **__: Any) -> list[np.ndarray | None]:
        """Embed a query with the model's prompt for queries.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        return self._embed([query], "query")

    def generate_embeddings(
        self, texts: Iterable[str], *_: Any, **__: Any
    ) -> list[np.ndarray | None]:
        """Embed texts with the model's prompt for documents.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        return self._embed(list(texts), "document")

    def _embed(self, texts: list[str], input_type: str) -> list[np.ndarray | None]:
        result = self._embedder.embed(texts, input_type=input_type, dimensions=self.dimensions)
        return list(result.vectors)

    @functools.cached_property
    def _embedder(self) -> Embedder:
        return open_embedder(None, self.model, url=self.url, config=self.config)
