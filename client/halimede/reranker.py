"""Rerankers: scores of documents for a query, from a blocking and an asyncio class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from typing_extensions import Unpack

from halimede.embedder import AsyncClient, BlockingClient, CallOptions, ModelFirst
from halimede.inputs.options import check_count
from halimede.inputs.pairs import listed, query_pairs, text_pairs
from halimede.pipeline import tasks
from halimede.results import Ranking, Scores
from halimede_ops.maxsim import best_first


class Reranker(ModelFirst, BlockingClient):
    """Ranks documents by their relevance to a query. Safe to use from several threads.

    The model is a reranker (cross-encoder). Its name is the first argument; the others are those of
    `Embedder`, by name.

    >>> with Reranker("ms-marco-MiniLM-L6-v2", url="127.0.0.1:8001") as reranker:
    ...     ranking = reranker.rank("capital of France", ["Berlin", "Paris"], top_k=1)
    """

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        progress: bool = False,
        **options: Unpack[CallOptions],
    ) -> Ranking:
        """Rank documents by their relevance to a query, the best first.

        Each document is scored together with the query. A pair beyond the token limit is cut off,
        its longer text first; `truncated` of the result tells which. All scores of a result come
        from one model: if a provider fails midway, the next one scores the whole call. Documents of
        equal score keep their order.

        Args:
            query: the query.
            documents: the documents.
            top_k: number of documents to return. None: all.
            return_documents: give the result the documents too.
            progress: show a progress bar on a terminal.
            sticky_key: key that decides whether a canary of the model answers, as for
                `Embedder.embed`.
            deadline_s: maximum time of this call. Default: that of the reranker.

        Returns:
            Its rows are the documents in the order of their scores: `scores` `[rows]` float32, and
            `indices` `[rows]` int64, each document's index in `documents`.

        Raises:
            InvalidText: a text is not a string, or cannot be encoded as UTF-8.
            UnsupportedInput: the model is no reranker.
            InvalidInput: an option is unknown or invalid.
            HalimedeError: as for `Embedder.embed`.
        """
        texts = listed(documents)
        top_k = check_count("top_k", top_k)
        scores = self._run(tasks.RANK, query_pairs(query, texts), progress, options)
        return ranked(scores, top_k, texts if return_documents else None)

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        progress: bool = False,
        **options: Unpack[CallOptions],
    ) -> Scores:
        """Score pairs of a query and a document: `scores` `[pairs]` float32, in their order.

        Args:
            pairs: the pairs, each `(query, document)`.
            progress: show a progress bar on a terminal.
            options: `sticky_key` and `deadline_s` as for `rank`.

        Raises:
            HalimedeError: as for `rank`.
        """
        return self._run(tasks.SCORE, text_pairs(pairs), progress, options)


class AsyncReranker(ModelFirst, AsyncClient):
    """`Reranker` for asyncio. Cancelling a call cancels its requests.

    >>> async with AsyncReranker("ms-marco-MiniLM-L6-v2") as reranker:
    ...     ranking = await reranker.rank("capital of France", ["Berlin", "Paris"], top_k=1)
    """

    async def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        progress: bool = False,
        **options: Unpack[CallOptions],
    ) -> Ranking:
        """As `Reranker.rank`."""
        texts = listed(documents)
        top_k = check_count("top_k", top_k)
        scores = await self._run(tasks.RANK, query_pairs(query, texts), progress, options)
        return ranked(scores, top_k, texts if return_documents else None)

    async def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        progress: bool = False,
        **options: Unpack[CallOptions],
    ) -> Scores:
        """As `Reranker.score`."""
        return await self._run(tasks.SCORE, text_pairs(pairs), progress, options)


def ranked(scores: Scores, top_k: int | None, documents: list[str] | None) -> Ranking:
    """Return the scores of documents as a ranking of the first `top_k`, with these documents."""
    order = best_first(scores.scores)[:top_k]
    fields = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
    in_order = {
        name: value[order] for name, value in fields.items() if isinstance(value, np.ndarray)
    }
    chosen = None if documents is None else tuple(documents[row] for row in order)
    return Ranking(**fields | in_order, documents=chosen)
