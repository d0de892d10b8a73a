"""LangChain: dense embeddings, and a reranker of retrieved documents.

Needs the extra `langchain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import Unpack

from halimede.embedder import Embedder
from halimede.extras import needs_extra
from halimede.integrations.clients import (
    Arguments,
    async_embedder,
    async_reranker,
    open_embedder,
    open_reranker,
)
from halimede.reranker import Reranker
from halimede.results import Ranking

with needs_extra("langchain"):
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.embeddings import Embeddings

SCORE = "relevance_score"
"""Key of a document's metadata that the reranker sets, as LangChain's other rerankers do."""


class HalimedeEmbeddings(Embeddings):
    """Embeddings of a served model, or of one in this process. Its async methods use no threads.

    Args:
        model: name of a served model, or of a model in the configuration. Default: as for
            `Embedder`.
        embedder: an embedder of yours, instead of a name and arguments.
        dimensions: leading components to keep, normalised again.
        arguments: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Embedder`.

    Raises:
        InvalidConfig: an argument is invalid.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        embedder: Embedder | None = None,
        dimensions: int | None = None,
        **arguments: Unpack[Arguments],
    ) -> None:
        self.embedder = open_embedder(embedder, model, **arguments)
        self.dimensions = dimensions

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts with the model's prompt for documents, one list of floats each.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        result = self.embedder.embed(texts, input_type="document", dimensions=self.dimensions)
        return result.vectors.tolist()

    def embed_query(self, text: str) -> list[float]:
        """Embed a text with the model's prompt for queries, as a list of floats.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        result = self.embedder.embed([text], input_type="query", dimensions=self.dimensions)
        return result.vectors[0].tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As `embed_documents`, on the caller's event loop."""
        result = await async_embedder(self.embedder).embed(
            texts, input_type="document", dimensions=self.dimensions
        )
        return result.vectors.tolist()

    async def aembed_query(self, text: str) -> list[float]:
        """As `embed_query`, on the caller's event loop."""
        result = await async_embedder(self.embedder).embed(
            [text], input_type="query", dimensions=self.dimensions
        )
        return result.vectors[0].tolist()


class HalimedeReranker(BaseDocumentCompressor):
    """Orders retrieved documents by a reranker's scores, the best first.

    Each document it returns is a copy with its score in `metadata["relevance_score"]`.

    Args:
        model: name of a served reranker, or of a reranker in the configuration.
        reranker: a reranker of yours, instead of a name and arguments.
        top_n: number of documents to return. None: all.
        arguments: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Reranker`.

    Raises:
        InvalidConfig: an argument is invalid.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    top_n: int | None = Field(None, gt=0)
    _reranker: Reranker = PrivateAttr()

    def __init__(
        self,
        model: str | None = None,
        *,
        reranker: Reranker | None = None,
        top_n: int | None = None,
        **arguments: Unpack[Arguments],
    ) -> None:
        super().__init__(model=model, top_n=top_n)  # type: ignore[call-arg]
        self._reranker = open_reranker(reranker, model, **arguments)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents for a query, the best first.

        Raises:
            HalimedeError: as for `Reranker.rank`.
        """
        texts = [document.page_content for document in documents]
        return _ordered(documents, self._reranker.rank(query, texts, top_k=self.top_n))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As `compress_documents`, on the caller's event loop."""
        texts = [document.page_content for document in documents]
        reranker = async_reranker(self._reranker)
        return _ordered(documents, await reranker.rank(query, texts, top_k=self.top_n))


def _ordered(documents: Sequence[Document], ranking: Ranking) -> list[Document]:
    def scored(document: Document, score: float) -> Document:
        metadata: dict[str, Any] = {**document.metadata, SCORE: score}
        return document.model_copy(update={"metadata": metadata})

    return [scored(documents[ranked.index], ranked.score) for ranked in ranking]
