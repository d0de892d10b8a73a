"""LlamaIndex: embeddings, a reranker of retrieved nodes, and sparse functions for a Qdrant store.

Needs the extra `llama-index`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from halimede_ops.errors import InvalidConfig, InvalidInput

with needs_extra("llama-index"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

BATCH_SIZE = 1024
"""Texts that LlamaIndex hands over at once. The client cuts them into requests itself."""
ARGUMENTS = frozenset(Arguments.__annotations__)
SparseFunction = Callable[[list[str]], tuple[list[list[int]], list[list[float]]]]
"""Texts → for each text its ids, and for each text the weights of the ids."""


class _Kept(BaseModel):
    """The client's arguments as fields, so that LlamaIndex writes and reads them."""

    url: Any = None
    config: str | None = None
    timeout_s: float | None = None
    deadline_s: float | None = None
    own_client: bool = False
    """Whether it was given a client, a provider or a configuration, which is not written."""

    # LlamaIndex's own methods leave out what cannot be copied, and open another client.
    def __getstate__(self) -> dict[Any, Any]:
        return BaseModel.__getstate__(self)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        BaseModel.__setstate__(self, state)


class HalimedeEmbedding(_Kept, BaseEmbedding):
    """Embeddings of a served model, or of one in this process. Its async methods use no threads.

    Args:
        model_name: name of a served model, or of a model in the configuration. Default: as for
            `Embedder`.
        embedder: an embedder of yours, instead of a name and arguments.
        dimensions: leading components to keep, normalised again.
        further: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Embedder`, and
            the fields of LlamaIndex's `BaseEmbedding`.

    Raises:
        InvalidConfig: an argument is invalid.
    """

    embed_batch_size: int = Field(default=BATCH_SIZE, gt=0, le=2048)
    dimensions: int | None = None
    _embedder: Embedder = PrivateAttr()

    def __init__(
        self,
        model_name: str | None = None,
        *,
        embedder: Embedder | None = None,
        dimensions: int | None = None,
        **further: Any,
    ) -> None:
        arguments, fields = _split(further, embedder)
        opened = open_embedder(embedder, model_name, **arguments)
        name = model_name or opened.config.default_model
        super().__init__(**{**fields, "model_name": name, "dimensions": dimensions})
        self._embedder = opened

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in what LlamaIndex stores."""
        return "HalimedeEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query], "query")[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text], "document")[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, "document")

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._aembed([query], "query"))[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aembed([text], "document"))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await self._aembed(texts, "document")

    def _embed(self, texts: list[str], input_type: str) -> list[list[float]]:
        result = self._embedder.embed(texts, input_type=input_type, dimensions=self.dimensions)
        return result.vectors.tolist()

    async def _aembed(self, texts: list[str], input_type: str) -> list[list[float]]:
        result = await async_embedder(self._embedder).embed(
            texts, input_type=input_type, dimensions=self.dimensions
        )
        return result.vectors.tolist()


class HalimedeRerank(_Kept, BaseNodePostprocessor):
    """Orders retrieved nodes by a reranker's scores, the best first.

    Args:
        model: name of a served reranker, or of a reranker in the configuration.
        reranker: a reranker of yours, instead of a name and arguments.
        top_n: number of nodes to return. None: all.
        further: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Reranker`, and
            the fields of LlamaIndex's `BaseNodePostprocessor`.

    Raises:
        InvalidConfig: an argument is invalid.
    """

    model: str = ""
    top_n: int | None = Field(default=None, gt=0)
    _reranker: Reranker = PrivateAttr()

    def __init__(
        self,
        model: str | None = None,
        *,
        reranker: Reranker | None = None,
        top_n: int | None = None,
        **further: Any,
    ) -> None:
        arguments, fields = _split(further, reranker)
        opened = open_reranker(reranker, model, **arguments)
        name = model or opened.config.default_model
        super().__init__(**{**fields, "model": name, "top_n": top_n})
        self._reranker = opened

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in what LlamaIndex stores."""
        return "HalimedeRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, texts = _read(nodes, query_bundle)
        return _ordered(nodes, self._reranker.rank(query, texts, top_k=self.top_n))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, texts = _read(nodes, query_bundle)
        reranker = async_reranker(self._reranker)
        return _ordered(nodes, await reranker.rank(query, texts, top_k=self.top_n))


class SparseFunctions(NamedTuple):
    """The two functions that LlamaIndex's `QdrantVectorStore` takes for hybrid search."""

    document: SparseFunction
    """For `sparse_doc_fn`."""
    query: SparseFunction
    """For `sparse_query_fn`."""


def sparse_functions(
    model: str | None = None,
    *,
    embedder: Embedder | None = None,
    **arguments: Unpack[Arguments],
) -> SparseFunctions:
    """Return the functions that embed texts as token weights, for documents and for queries.

    Args:
        model: name of a sparse model, or of a dense one with a sparse head such as bge-m3.
        embedder: an embedder of yours, instead of a name and arguments.
        arguments: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Embedder`.

    Raises:
        InvalidConfig: an argument is invalid. The functions raise as `Embedder.embed_sparse`.
    """
    opened = open_embedder(embedder, model, **arguments)

    def of(input_type: str) -> SparseFunction:
        def embed(texts: list[str]) -> tuple[list[list[int]], list[list[float]]]:
            result = opened.embed_sparse(texts, input_type=input_type)
            return [ids.tolist() for ids in result.ids], [row.tolist() for row in result.weights]

        return embed

    return SparseFunctions(of("document"), of("query"))


def _split(further: Mapping[str, Any], client: object) -> tuple[Arguments, dict[str, Any]]:
    """Return the client's arguments, and the fields of LlamaIndex's class and of `_Kept`.

    Raises:
        InvalidConfig: they were read from what LlamaIndex wrote, without the client.
    """
    arguments: Any = {name: value for name, value in further.items() if name in ARGUMENTS}
    fields = {name: value for name, value in further.items() if name not in ARGUMENTS}
    config = arguments.get("config")
    is_path = config is None or isinstance(config, (str, Path))
    is_own = client is not None or "providers" in arguments or not is_path
    if fields.pop("own_client", False) and not is_own:
        raise InvalidConfig("the client is not among what LlamaIndex wrote; give it again.")
    kept = {name: arguments.get(name) for name in ("url", "timeout_s", "deadline_s")}
    path = str(config) if is_path and config is not None else None
    return arguments, {**fields, **kept, "config": path, "own_client": is_own}


def _read(nodes: list[NodeWithScore], bundle: QueryBundle | None) -> tuple[str, list[str]]:
    if bundle is None:
        raise InvalidInput("there is no query; give query_str or query_bundle.")
    texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    return bundle.query_str, texts


def _ordered(nodes: list[NodeWithScore], ranking: Ranking) -> list[NodeWithScore]:
    return [NodeWithScore(node=nodes[one.index].node, score=one.score) for one in ranking]
