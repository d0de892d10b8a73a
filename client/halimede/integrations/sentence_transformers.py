"""sentence-transformers' shape: code written for its classes runs on an embedder or a reranker.

Every parameter of `SentenceTransformer.encode` and `CrossEncoder.predict` is accepted. One that
decides where and in which portions a model computes has no effect, because the server decides
that: `batch_size`, `pool`, `chunk_size`, and `device`, which only says where a tensor goes. One
that asks for something that the server does not give raises UnsupportedInput. torch is imported for
tensors alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec, Self, TypeVar, overload

import numpy as np
from typing_extensions import Unpack

from halimede.embedder import BlockingClient, Embedder
from halimede.extras import import_optional
from halimede.inputs.options import check_count
from halimede.integrations import mteb
from halimede.integrations.clients import Arguments, open_embedder
from halimede.integrations.similarities import PAIRWISE, SIMILARITIES, SimilarityName
from halimede.reranker import Reranker
from halimede_ops.errors import InvalidInput, UnsupportedInput
from halimede_ops.quantise import quantise
from halimede_ops.vectors import normalise

P = ParamSpec("P")
R = TypeVar("R")
EXTRA = "sentence-transformers"
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
SENTENCE_EMBEDDING = "sentence_embedding"


class ModelCard(NamedTuple):
    """What programs read of `model_card_data`."""

    model_name: str
    model_id: str
    base_model: str
    base_model_revision: str
    """The version and the space of the served model."""


@overload
def as_sentence_transformer(client: Reranker) -> CrossEncoderAdapter: ...


@overload
def as_sentence_transformer(
    client: Embedder | str | None = None,
    *,
    truncate_dim: int | None = None,
    similarity_fn_name: str | None = None,
    **arguments: Unpack[Arguments],
) -> SentenceTransformerAdapter: ...


def as_sentence_transformer(
    client: Embedder | Reranker | str | None = None,
    *,
    truncate_dim: int | None = None,
    similarity_fn_name: str | None = None,
    **arguments: Unpack[Arguments],
) -> SentenceTransformerAdapter | CrossEncoderAdapter:
    """Return an embedder in the shape of `SentenceTransformer`, a reranker in `CrossEncoder`'s.

    Args:
        client: an embedder, a reranker, or the name of an embedding model. Default: as for
            `Embedder`.
        truncate_dim: components to keep of each vector, as `SentenceTransformer`'s argument.
        similarity_fn_name: cosine, dot, euclidean or manhattan. Default: cosine. The server does
            not report what the model's folder names.
        arguments: `url`, `config`, `timeout_s`, `deadline_s` and `providers` as for `Embedder`,
            beside a name.

    Raises:
        InvalidConfig: an argument is invalid.
        InvalidInput: there is no such similarity.
    """
    if isinstance(client, Reranker):
        return CrossEncoderAdapter(client)
    given, name = (None, client) if isinstance(client, str) else (client, None)
    embedder = open_embedder(given, name, **arguments)
    return SentenceTransformerAdapter(embedder, truncate_dim, similarity_fn_name)


def _accepting(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Accept other names of parameters: of earlier sentence-transformers, and of mteb."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def accepts(*arguments: P.args, **named: P.kwargs) -> R:
            for other, own in names.items():
                if other in named:
                    named[own] = named.pop(other)
            return method(*arguments, **named)

        return accepts

    return decorate


class _Adapter:
    """What both shapes share."""

    _client: BlockingClient
    device = "cpu"
    """Where tensors are made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def eval(self) -> Self:
        """Return this object: a served model is never trained."""
        return self

    def to(self, device: object = None) -> Self:
        """Return this object: the server decides where the model runs.

        Raises:
            UnsupportedInput: another precision is asked for.
        """
        if type(device).__name__ == "dtype":
            raise UnsupportedInput(
                f"to() is given {device}; the precision is that of the served model. Name a model "
                "in another precision, such as all-MiniLM-L6-v2-fp16."
            )
        return self

    def start_multi_process_pool(self, target_devices: object = None) -> dict[str, Any]:
        """Return an empty pool: the server spreads the work itself."""
        return {}

    def stop_multi_process_pool(self, pool: object = None) -> None:
        """Do nothing."""

    @property
    def max_seq_length(self) -> int:
        """Token limit of a text, or of both texts of a pair."""
        return self._client.model.max_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value != self.max_seq_length:
            raise UnsupportedInput(
                f"max_seq_length is {value}; the model is served with {self.max_seq_length}. Build "
                "it with another limit."
            )

    def get_max_seq_length(self) -> int:
        """Token limit of a text, or of both texts of a pair."""
        return self.max_seq_length

    @property
    def model_card_data(self) -> ModelCard:
        """Name, version and space of the served model."""
        model = self._client.model
        revision = "-".join(filter(None, (model.version, model.space)))
        return ModelCard(model.name, model.name, model.name, revision)

    @property
    def mteb_model_meta(self) -> Any:
        """The model as mteb describes it: mteb takes what has one as an encoder of its own."""
        return mteb.model_meta(self._client.model, getattr(self, "similarity_fn_name", None))


class SentenceTransformerAdapter(_Adapter):
    """An embedder in the shape of `sentence_transformers.SentenceTransformer`.

    Its vectors are those of the same model there: `truncate_dim` does not normalise again, and int8
    and uint8 measure their ranges over the vectors of the call. It is an encoder for mteb too.
    """

    def __init__(
        self,
        embedder: Embedder,
        truncate_dim: int | None = None,
        similarity_fn_name: str | None = None,
    ) -> None:
        self._client = self._embedder = embedder
        self.truncate_dim = truncate_dim
        self.similarity_fn_name = similarity_fn_name

    @_accepting(sentences="inputs")
    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"]
        | None = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **further: Any,
    ) -> Any:
        """Embed texts: `[texts, dims]` float32, or `[dims]` of a single string.

        The model's default prompt is added, as there. `prompt_name` names another one.

        Raises:
            UnsupportedInput: `prompt` or `output_value` asks for what a server does not give.
            UnknownInputType: the model has no such prompt.
            HalimedeError: as for `Embedder.embed`.
        """
        if mteb.TASK in further:
            inputs, prompt_name = mteb.texts(inputs), mteb.input_type(further)
        _refuse_unknown("encode", further)
        _refuse_prompt(prompt)
        _check_batch_size(batch_size)
        if output_value != SENTENCE_EMBEDDING:
            raise UnsupportedInput(
                f"output_value is {output_value}; the server gives '{SENTENCE_EMBEDDING}'. For a "
                "vector of each token, call Embedder.embed_multi of a model that has them."
            )
        texts, is_single = _listed(inputs)
        vectors = self._embed(texts, prompt_name, bool(show_progress_bar))
        dims = check_count(
            "truncate_dim", self.truncate_dim if truncate_dim is None else truncate_dim
        )
        vectors = vectors[:, :dims]
        vectors = normalise(vectors) if normalize_embeddings else vectors
        vectors = _quantised(vectors, precision)
        result = _converted(vectors, convert_to_numpy, convert_to_tensor, device)
        return result[0] if is_single else result

    @_accepting(sentences="inputs")
    def encode_query(
        self,
        inputs: Iterable[str] | str,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *options: Any,
        **named: Any,
    ) -> Any:
        """Embed queries: as `encode`, with the model's prompt for queries."""
        return self.encode(inputs, prompt_name or "query", prompt, *options, **named)

    @_accepting(sentences="inputs")
    def encode_document(
        self,
        inputs: Iterable[str] | str,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *options: Any,
        **named: Any,
    ) -> Any:
        """Embed documents: as `encode`, with the model's prompt for documents.

        It is the first of the prompts `document`, `passage` and `corpus` that is not empty.
        sentence-transformers 5 takes an empty `document`, which it writes into every folder.
        """
        return self.encode(inputs, prompt_name or "document", prompt, *options, **named)

    def _embed(self, texts: list[str], input_type: str | None, progress: bool) -> np.ndarray:
        if not texts:
            return np.empty((0, self._embedder.model.dims), np.float32)
        return self._embedder.embed(texts, input_type=input_type, progress=progress).vectors

    @property
    def similarity_fn_name(self) -> SimilarityName:
        """What `similarity` computes: cosine, dot, euclidean or manhattan."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: Any) -> None:
        name = getattr(name, "value", name) or "cosine"
        if name not in SIMILARITIES:
            raise InvalidInput(
                f"similarity_fn_name is not known; give one of {', '.join(SIMILARITIES)}."
            )
        self._similarity_fn_name: SimilarityName = name

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compute the similarity of each row to each row: `[n, dims]`, `[m, dims]` → `[n, m]`.

        It is a tensor, as there, if torch is installed, else an array.
        """
        return _tensor(
            SIMILARITIES[self.similarity_fn_name](_array(embeddings1), _array(embeddings2))
        )

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compute the similarity of the rows at each place: `[n, dims]` twice → `[n]`.

        It is a tensor, as there, if torch is installed, else an array.
        """
        return _tensor(PAIRWISE[self.similarity_fn_name](_array(embeddings1), _array(embeddings2)))

    def get_embedding_dimension(self) -> int:
        """Components of a vector, after `truncate_dim`."""
        dims = self._embedder.model.dims
        return dims if self.truncate_dim is None else min(dims, self.truncate_dim)

    def get_sentence_embedding_dimension(self) -> int:
        """Components of a vector, after `truncate_dim`."""
        return self.get_embedding_dimension()

    @contextlib.contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Keep this many components within a `with` block."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    def truncate_sentence_embeddings(
        self, truncate_dim: int | None
    ) -> contextlib.AbstractContextManager[None]:
        """As `truncate_embeddings`."""
        return self.truncate_embeddings(truncate_dim)


class CrossEncoderAdapter(_Adapter):
    """A reranker in the shape of `sentence_transformers.CrossEncoder`, also for mteb.

    The server applies the activation that the model's folder names.
    """

    num_labels = 1

    def __init__(self, reranker: Reranker) -> None:
        self._client = self._reranker = reranker

    @property
    def max_length(self) -> int:
        """Token limit of both texts of a pair."""
        return self.max_seq_length

    @_accepting(sentences="inputs", inputs1="inputs", inputs2="prompt_name")
    def predict(
        self,
        inputs: Any,
        prompt_name: Any = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **further: Any,
    ) -> Any:
        """Score pairs of texts: `[pairs]` float32, or one number of a single pair.

        Raises:
            UnsupportedInput: a prompt, an activation or a softmax is asked for.
            HalimedeError: as for `Reranker.score`.
        """
        if mteb.TASK in further:
            inputs = list(zip(mteb.texts(inputs), mteb.texts(prompt_name), strict=True))
            prompt_name, _ = None, mteb.input_type(further)
        _refuse_unknown("predict", further)
        _refuse_prompt(prompt_name, "prompt_name")
        _refuse_prompt(prompt)
        _check_batch_size(batch_size)
        if activation_fn is not None or apply_softmax:
            raise UnsupportedInput(
                "activation_fn or apply_softmax is given; the server applies the activation of the "
                "model's folder. Omit them."
            )
        pairs = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
        is_single = len(pairs) > 0 and isinstance(pairs[0], str)
        scores = self._reranker.score(
            [tuple(pairs)] if is_single else pairs, progress=bool(show_progress_bar)
        ).scores
        result = _converted(scores, convert_to_numpy, convert_to_tensor, device)
        return result[0] if is_single else result

    def rank(
        self,
        query: str,
        documents: list[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents, the best first: of each `corpus_id`, `score`, and `text` if asked.

        Raises:
            HalimedeError: as for `predict`.
        """
        scores = self.predict(
            [(query, document) for document in documents],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            apply_softmax=apply_softmax,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            device=device,
        )
        ranked = [
            {"corpus_id": place, "score": score}
            | ({"text": documents[place]} if return_documents else {})
            for place, score in enumerate(scores)
        ]
        return sorted(ranked, key=lambda row: row["score"], reverse=True)[:top_k]


def _listed(inputs: Any) -> tuple[list[str], bool]:
    """Return texts as a list, and whether they were a single one."""
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs, np.ndarray):
        return inputs.tolist() if inputs.ndim else [inputs.item()], not inputs.ndim
    if not isinstance(inputs, Iterable) or isinstance(inputs, (Mapping, bytes)):
        raise UnsupportedInput(
            f"inputs is {type(inputs).__name__}; give a str or a list of str. For images, call "
            "Embedder.embed_images."
        )
    return list(inputs), False


def _refuse_unknown(method: str, further: Mapping[str, Any]) -> None:
    if further:
        raise UnsupportedInput(
            f"{method} is given {', '.join(sorted(further))}, which the server does not take; omit "
            "it. For queries and documents, call encode_query and encode_document."
        )


def _refuse_prompt(prompt: object, name: str = "prompt") -> None:
    if prompt is not None:
        raise UnsupportedInput(
            f"{name} is given; the server adds the model's own prompts. Name one of them with "
            "prompt_name of encode, or put the words in front of the texts of a model that has no "
            "prompts."
        )


def _check_batch_size(batch_size: int) -> None:
    if batch_size <= 0:
        raise InvalidInput(f"batch_size is {batch_size}; give a whole number above 0.")


def _quantised(vectors: np.ndarray, precision: str | None) -> np.ndarray:
    if precision not in (None, *PRECISIONS):
        raise InvalidInput(f"precision is not known; give one of {', '.join(PRECISIONS)}.")
    if precision in (None, "float32"):
        return vectors
    return quantise(vectors, precision)  # type: ignore[arg-type]


def _converted(values: np.ndarray, to_numpy: bool, to_tensor: bool, device: Any) -> Any:
    """Return rows as an array, as one tensor, or as a list of tensors."""
    if to_numpy and not to_tensor:
        return values
    torch = import_optional("torch", EXTRA)
    tensor = torch.from_numpy(np.array(values))
    if device is not None and not isinstance(device, list):
        tensor = tensor.to(device)
    return tensor if to_tensor else list(tensor)


def _array(values: Any) -> np.ndarray:
    """Return vectors as an array of floats: of an array, a tensor, or a list of either."""
    if isinstance(values, (list, tuple)) and values and hasattr(values[0], "detach"):
        values = [_array(value) for value in values]
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def _tensor(values: np.ndarray) -> Any:
    if importlib.util.find_spec("torch") is None:
        return values
    return import_optional("torch", EXTRA).from_numpy(np.asarray(values))
