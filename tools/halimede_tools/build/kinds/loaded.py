"""Loaded: what is made right, or refused, in a model that its library has opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import POOLED, TOKEN_TYPES
from halimede_tools.build.kinds import contents
from halimede_tools.build.vision import two_towers

PROBE = "word"
"""A text to embed while a model is opened."""


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
        InvalidModel: its tokenizer has an id beyond its table, it puts texts into a chat, or its
            modules do not fit together.
    """
    _check_vocabulary(model, name)
    if not embeds_texts(model):
        return
    if "message" in model[0].modality_config:
        raise InvalidModel(
            f"{name}'s tokenizer has a chat template, and sentence-transformers puts every text "
            "into it, which is not supported. If the model was trained on plain texts, remove "
            "chat_template.jinja, chat_template in tokenizer_config.json, and message in the "
            "modality_config of sentence_bert_config.json."
        )
    # Padding on the left moves the first token and the positions of a shorter text.
    model.tokenizer.padding_side = "right"
    for options in model[0].processing_kwargs.values():
        options.pop("padding_side", None)
    if model.truncate_dim is not None:
        dims, model.truncate_dim = model.truncate_dim, None
        model.append(Cut(dims))
    _check_modules(model, name)


def needs_token_types(model: Any) -> bool:
    """Whether a model gives another vector if it is not given the token types of a text.

    Most models take 0 for each token where none are given, which is what most tokenizers give.
    Those of Funnel and XLNet give a type of its own to the token of the whole text.
    """
    if not embeds_texts(model) or model[0].backend != "torch":
        return False
    given = model.preprocess([PROBE])
    if TOKEN_TYPES not in given:
        return False
    types = given.pop(TOKEN_TYPES)
    with torch.no_grad(), _probing(model):
        without, with_types = model(dict(given)), model({**given, TOKEN_TYPES: types})
    return not torch.allclose(without[POOLED], with_types[POOLED], rtol=1e-4, atol=1e-5)


@contextmanager
def _probing(model: Any) -> Iterator[None]:
    """Within it, a short text may be embedded: BigBird otherwise computes full attention from its
    first short text on, and its long texts would have vectors that a new model does not give.
    """
    transformer: Any = model[0].auto_model
    attention = getattr(transformer, "attention_type", None)
    yield
    if attention is not None:
        transformer.set_attention_type(attention)


def check_weights(model: Any, folder: Path, name: str) -> None:
    """Raise unless the folder has all weights of a loaded model's transformer: transformers gives
    random values to those that are missing.

    Raises:
        InvalidModel: it lacks some.
    """
    transformer: Any = getattr(model[0], "auto_model", None)
    if not isinstance(transformer, PreTrainedModel):
        return
    _, found = type(transformer).from_pretrained(
        contents.module_folders(folder)[0],
        config=transformer.config,
        local_files_only=True,
        output_loading_info=True,
    )
    # sentence-transformers does not use the pooler of transformers' own.
    missing = sorted(key for key in found["missing_keys"] if "pooler." not in key)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InvalidModel(
            f"{name} is incomplete: its weights lack {', '.join(missing[:3])}{more}, which a "
            f"{type(transformer).__name__} has."
        )


def embeds_texts(model: Any) -> bool:
    """Whether a loaded model gives one vector for a text, by a transformer and pooling."""
    is_dense = type(model).__name__ == "SentenceTransformer"
    return is_dense and "Pooling" in [type(module).__name__ for module in model]


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
        with _probing(model):
            length = len(model.encode(PROBE, show_progress_bar=False))
    except Exception as error:  # torch and each architecture raise their own
        raise InvalidModel(f"{name} cannot embed a text: {_cause(model, error)}") from error
    if length != model.get_embedding_dimension():
        raise InvalidModel(
            f"{name} gives vectors of {length} dimensions; its modules' configs say "
            f"{model.get_embedding_dimension()}. Correct word_embedding_dimension or out_features."
        )


def _cause(model: Any, error: Exception) -> str:
    """Why a model cannot embed a text, and what to do, of the error that its library raised."""
    words = " ".join(str(error).split())[:120]
    transformer = model[0].auto_model
    if TOKEN_TYPES in words:
        return (
            f"its tokenizer gives {TOKEN_TYPES}, which a {type(transformer).__name__} does not "
            'take. Set model_input_names to ["input_ids", "attention_mask"] in '
            "tokenizer_config.json."
        )
    if transformer.config.model_type == "xmod":
        return (
            "it has weights for each language and does not know which to take. Set "
            f"default_language in config.json to one of {', '.join(transformer.config.languages)}."
        )
    if "shapes cannot be multiplied" in words:
        return f"the sizes of its modules do not fit together ({words})."
    return f"sentence-transformers raises {type(error).__name__} ({words})."
