"""LangChain's store on Qdrant: sparse embeddings for its hybrid search.

Needs the extra `langchain-qdrant`.
"""

from __future__ import annotations

from typing_extensions import Unpack

from halimede.embedder import Embedder
from halimede.extras import needs_extra
from halimede.integrations.clients import Arguments, async_embedder, open_embedder
from halimede.results import SparseEmbeddings as Sparse

with needs_extra("langchain-qdrant"):
    from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector


class HalimedeSparseEmbeddings(SparseEmbeddings):
    """Token weights of a sparse model, or of a dense one with a sparse head such as bge-m3.

    Args:
        model: name of a served model, or of a model in the configuration.
        embedder: an embedder of yours, instead of a name and arguments.
        arguments: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Embedder`.

    Raises:
        InvalidConfig: an argument is invalid.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        embedder: Embedder | None = None,
        **arguments: Unpack[Arguments],
    ) -> None:
        self.embedder = open_embedder(embedder, model, **arguments)

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Embed texts with the model's prompt for documents.

        Raises:
            HalimedeError: as for `Embedder.embed_sparse`.
        """
        return _vectors(self.embedder.embed_sparse(texts, input_type="document"))

    def embed_query(self, text: str) -> SparseVector:
        """Embed a text with the model's prompt for queries.

        Raises:
            HalimedeError: as for `Embedder.embed_sparse`.
        """
        return _vectors(self.embedder.embed_sparse([text], input_type="query"))[0]

    async def aembed_documents(self, texts: list[str]) -> list[SparseVector]:
        """As `embed_documents`, on the caller's event loop."""
        embedder = async_embedder(self.embedder)
        return _vectors(await embedder.embed_sparse(texts, input_type="document"))

    async def aembed_query(self, text: str) -> SparseVector:
        """As `embed_query`, on the caller's event loop."""
        embedder = async_embedder(self.embedder)
        return _vectors(await embedder.embed_sparse([text], input_type="query"))[0]


def _vectors(result: Sparse) -> list[SparseVector]:
    return [
        SparseVector(indices=ids.tolist(), values=weights.tolist())
        for ids, weights in zip(result.ids, result.weights, strict=True)
    ]
