"""Loaded: what is made right, or refused, in a model that its library has opened."""

from __future__ import annotations

from typing import Any

import torch

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import POOLED, TOKEN_EMBEDDINGS, TOKEN_TYPES
from halimede_tools.build.vision import two_towers


class Cut(torch.nn.Module):
    """The first components of a vector: sentence-transformers' `truncate_dim`."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        """Features with the first `dims` components of POOLED."""
        features[POOLED] = features[POOLED][..., : self.dims]
        return features

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.dims


def prepare(model: Any, name: str) -> None:
    """Make a loaded model give for a text in a batch what it gives for the text alone, and check
    that it embeds one.

    Raises:
        InvalidModel: its tokenizer has an id beyond its table, or its modules do not fit together.
    """
    _check_vocabulary(model, name)
    if type(model).__name__ != "SentenceTransformer" or not _takes_texts(model):
        return
    # Padding on the left moves the first token and the positions of a shorter text.
    model.tokenizer.padding_side = "right"
    if model.truncate_dim is not None:
        dims, model.truncate_dim = model.truncate_dim, None
        model.append(Cut(dims))
    _check_modules(model, name)


def needs_token_types(model: Any) -> bool:
    """Whether the token types that the tokenizer gives for a text change the hidden states. BERT's
    are zeros, which it also takes without being told; XLNet's and GPT-2's are not.
    """
    if not _takes_texts(model):
        return False
    features = dict(model[0].preprocess(["a text"]))
    if TOKEN_TYPES not in features:
        return False
    without = {key: value for key, value in features.items() if key != TOKEN_TYPES}
    with torch.no_grad():
        one, other = (model[0](dict(given))[TOKEN_EMBEDDINGS] for given in (features, without))
    return not torch.equal(one, other)


def _takes_texts(model: Any) -> bool:
    return "Pooling" in [type(module).__name__ for module in model]


def _check_vocabulary(model: Any, name: str) -> None:
    """Refuse a tokenizer with an id that the model has no vector of: PyTorch raises for it, other
    engines compute with what lies behind the table.
    """
    table = _table(model)
    rows = getattr(table, "num_embeddings", None)
    largest = max(model.tokenizer.get_vocab().values(), default=0)
    if rows is not None and largest >= rows:
        raise InvalidModel(
            f"{name}'s tokenizer gives ids up to {largest:,}; its table has vectors of 0 to "
            f"{rows - 1:,}. Call resize_token_embeddings(len(tokenizer)) and save the model again."
        )


def _table(model: Any) -> Any:
    """The embedding of tokens of a loaded model; None if it does not tell which it is."""
    transformer: Any = getattr(model[0], "auto_model", None)
    if two_towers.has_two_towers(model):
        return transformer.text_model.embeddings.token_embedding
    try:
        return getattr(transformer, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' own answer
        return None


def _check_modules(model: Any, name: str) -> None:
    """Embed one word: modules whose sizes do not fit fail here, not with every request."""
    try:
        length = len(model.encode("word", show_progress_bar=False))
    except RuntimeError as error:
        raise InvalidModel(
            f"{name} cannot embed a text: the sizes of its modules do not fit together "
            f"({' '.join(str(error).split())[:120]})."
        ) from error
    if length != model.get_embedding_dimension():
        raise InvalidModel(
            f"{name} gives vectors of {length} dimensions; its modules' configs say "
            f"{model.get_embedding_dimension()}. Correct word_embedding_dimension or out_features."
        )
