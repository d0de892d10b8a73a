"""Chroma: an embedding function that collections keep by its name, `halimede`.

Needs the extra `index-chroma`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from halimede.extras import needs_extra
from halimede.integrations.clients import open_embedder

with needs_extra("index-chroma"):
    from chromadb import EmbeddingFunction
    from chromadb.utils.embedding_functions import register_embedding_function


@register_embedding_function
class HalimedeEmbeddingFunction(EmbeddingFunction):  # type: ignore[misc]
    """Embeds a collection's documents and the queries to it.

    Args:
        model: name of a served model, or of a model in the configuration. Default: as for
            `Embedder`.
        url: address of the server, as for `Embedder`.
        config: configuration, or the path of its file, as for `Embedder`.
        dimensions: leading components to keep, normalised again.

    Raises:
        InvalidConfig: an argument is invalid.
    """

    def __init__(
        self,
        model: str | None = None,
        url: str | None = None,
        config: dict[str, Any] | str | None = None,
        dimensions: int | None = None,
    ) -> None:
        self._arguments = {"model": model, "url": url, "config": config, "dimensions": dimensions}
        self._dimensions = dimensions
        self.embedder = open_embedder(None, model, url=url, config=config)

    def __call__(self, input: list[str]) -> list[np.ndarray]:  # noqa: A002
        """Embed documents with the model's prompt for documents.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        return self._embed(input, "document")

    def embed_query(self, input: list[str]) -> list[np.ndarray]:  # noqa: A002
        """Embed queries with the model's prompt for queries.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        return self._embed(input, "query")

    def _embed(self, texts: list[str], input_type: str) -> list[np.ndarray]:
        result = self.embedder.embed(texts, input_type=input_type, dimensions=self._dimensions)
        return list(result.vectors)

    @staticmethod
    def name() -> str:
        """Name that a collection keeps."""
        return "halimede"

    def default_space(self) -> str:
        """Distance of a new collection."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, which a collection keeps."""
        return dict(self._arguments)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> HalimedeEmbeddingFunction:
        """Make the function that a collection keeps."""
        return HalimedeEmbeddingFunction(**config)

    def validate_config_update(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Refuse another model or other dimensions: its vectors could not be compared.

        Raises:
            ValueError: the new configuration has them.
        """
        for name in ("model", "dimensions"):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{name} of a collection cannot change: vectors of two models cannot be "
                    "compared. Make a new collection."
                )
