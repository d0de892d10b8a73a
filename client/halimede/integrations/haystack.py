"""Haystack 2: embedders of texts and documents, and a ranker. Needs the extra `haystack`.

A component is written to a pipeline's YAML with the name of its model and its arguments. One that
was given a client of yours cannot be written.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np

from halimede.embedder import Embedder
from halimede.extras import needs_extra
from halimede.integrations.clients import (
    async_embedder,
    async_reranker,
    open_embedder,
    open_reranker,
)
from halimede.reranker import Reranker
from halimede.results import Embeddings, Ranking
from halimede_ops.errors import InvalidConfig

with needs_extra("haystack"):
    from haystack import Document, component, default_from_dict, default_to_dict


class _Component:
    """What the components share: their arguments, and how they are written and read."""

    def _keep(self, client: object, **arguments: Any) -> dict[str, Any]:
        """Keep the arguments for `to_dict`; return those of the client that are given."""
        self._has_own_client = client is not None
        self._arguments = arguments
        names = ("model", "url", "config", "timeout_s", "deadline_s")
        return {name: arguments[name] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack writes it.

        Raises:
            InvalidConfig: it was given a client, which cannot be written.
        """
        if self._has_own_client:
            raise InvalidConfig(
                f"{type(self).__name__} was given a client, which cannot be written. Give it "
                "model, url or config instead."
            )
        written = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self._arguments.items()
        }
        return default_to_dict(self, **written)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the component that `to_dict` wrote."""
        return default_from_dict(cls, data)


@component
class HalimedeTextEmbedder(_Component):
    """Embeds one text, such as a query, with the model's prompt for queries."""

    def __init__(
        self,
        model: str | None = None,
        *,
        embedder: Embedder | None = None,
        url: str | None = None,
        config: dict[str, Any] | str | Path | None = None,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        dimensions: int | None = None,
    ) -> None:
        """Open an embedder, or take yours.

        Args:
            model: name of a served model, or of a model in the configuration. Default: as for
                `Embedder`.
            embedder: an embedder of yours, instead of a name and the next four arguments.
            url: address of the server, as for `Embedder`.
            config: configuration, or the path of its file, as for `Embedder`.
            timeout_s: maximum time of one request.
            deadline_s: maximum time of one call.
            dimensions: leading components to keep, normalised again.

        Raises:
            InvalidConfig: an argument is invalid.
        """
        arguments = self._keep(
            embedder,
            model=model,
            url=url,
            config=config,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            dimensions=dimensions,
        )
        self.embedder = open_embedder(embedder, **arguments)
        self.dimensions = dimensions

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a text: `embedding`, and `meta` with model, space, precision and tokens.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        return self._answer(
            self.embedder.embed([text], input_type="query", dimensions=self.dimensions)
        )

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """As `run`, on the caller's event loop."""
        embedder = async_embedder(self.embedder)
        return self._answer(
            await embedder.embed([text], input_type="query", dimensions=self.dimensions)
        )

    def _answer(self, result: Embeddings) -> dict[str, Any]:
        return {"embedding": result.vectors[0].tolist(), "meta": _meta(result)}


@component
class HalimedeDocumentEmbedder(_Component):
    """Embeds documents with the model's prompt for documents."""

    def __init__(
        self,
        model: str | None = None,
        *,
        embedder: Embedder | None = None,
        url: str | None = None,
        config: dict[str, Any] | str | Path | None = None,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        dimensions: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        """Open an embedder, or take yours.

        The arguments are those of `HalimedeTextEmbedder`, and two more. `meta_fields_to_embed` are
        fields of a document's `meta` to put in front of its content; `embedding_separator` stands
        between them.

        Raises:
            InvalidConfig: an argument is invalid.
        """
        arguments = self._keep(
            embedder,
            model=model,
            url=url,
            config=config,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            dimensions=dimensions,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
        )
        self.embedder = open_embedder(embedder, **arguments)
        self.dimensions = dimensions
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents: `documents`, copies with embeddings, and `meta` as for a text.

        Raises:
            HalimedeError: as for `Embedder.embed`.
        """
        if not documents:
            return {"documents": [], "meta": {}}
        texts = _texts(documents, self.meta_fields_to_embed, self.embedding_separator)
        result = self.embedder.embed(texts, input_type="document", dimensions=self.dimensions)
        return _embedded(documents, result)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """As `run`, on the caller's event loop."""
        if not documents:
            return {"documents": [], "meta": {}}
        texts = _texts(documents, self.meta_fields_to_embed, self.embedding_separator)
        embedder = async_embedder(self.embedder)
        result = await embedder.embed(texts, input_type="document", dimensions=self.dimensions)
        return _embedded(documents, result)


@component
class HalimedeRanker(_Component):
    """Orders documents by a reranker's scores for a query, the best first."""

    def __init__(
        self,
        model: str | None = None,
        *,
        reranker: Reranker | None = None,
        url: str | None = None,
        config: dict[str, Any] | str | Path | None = None,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        top_k: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        """Open a reranker, or take yours.

        The arguments are those of `HalimedeDocumentEmbedder`, with `reranker` for a reranker of
        yours, and `top_k`, the number of documents to return. None: all.

        Raises:
            InvalidConfig: an argument is invalid.
        """
        arguments = self._keep(
            reranker,
            model=model,
            url=url,
            config=config,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            top_k=top_k,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
        )
        self.reranker = open_reranker(reranker, **arguments)
        self.top_k = top_k
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, Any]:
        """Return `documents`, copies with scores, the best first.

        Raises:
            HalimedeError: as for `Reranker.rank`.
        """
        texts = _texts(documents, self.meta_fields_to_embed, self.embedding_separator)
        return _ranked(
            documents,
            self.reranker.rank(query, texts, top_k=self.top_k if top_k is None else top_k),
        )

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, Any]:
        """As `run`, on the caller's event loop."""
        texts = _texts(documents, self.meta_fields_to_embed, self.embedding_separator)
        reranker = async_reranker(self.reranker)
        return _ranked(
            documents,
            await reranker.rank(query, texts, top_k=self.top_k if top_k is None else top_k),
        )


def _texts(documents: list[Document], fields: list[str], separator: str) -> list[str]:
    """Return each document's content behind some fields of its `meta`."""
    return [
        separator.join(
            [
                *(
                    str(document.meta[name])
                    for name in fields
                    if document.meta.get(name) is not None
                ),
                document.content or "",
            ]
        )
        for document in documents
    ]


def _embedded(documents: list[Document], result: Embeddings) -> dict[str, Any]:
    embedded = [
        dataclasses.replace(document, embedding=vector.tolist())
        for document, vector in zip(documents, result.vectors, strict=True)
    ]
    return {"documents": embedded, "meta": _meta(result)}


def _ranked(documents: list[Document], ranking: Ranking) -> dict[str, Any]:
    return {
        "documents": [dataclasses.replace(documents[one.index], score=one.score) for one in ranking]
    }


def _meta(result: Embeddings) -> dict[str, Any]:
    tokens = int(np.maximum(result.tokens, 0).sum())
    return {
        "model": result.model,
        "space": result.space,
        "precision": result.precision,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
