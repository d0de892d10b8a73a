"""Static: models without a transformer. A text's vector is the mean of its tokens' vectors, which a
table holds.

sentence-transformers' StaticEmbedding and plain model2vec folders have this form. Neither adds
special tokens. A folder has a token limit if its tokenizer.json, or model2vec's config, names one.
model2vec saves a modules.json too, but sentence-transformers does not read its mapping and weights:
a folder that has them is read as model2vec reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from halimede_ops.errors import InvalidModel
from halimede_tools.build.kinds.files import read_json

MODULE = "StaticEmbedding"
MODEL2VEC = "model2vec"
MAX_TOKENS = 32_768
"""Token limit of a static model whose folder names none. Its memory grows with the tokens of a
text, not with their square."""


class Table(NamedTuple):
    """What a static model is made of, besides its tokenizer."""

    vectors: Any
    """Tensor `[vocabulary, dims]` float32."""
    left_out: int | None
    """Id of a token that counts in no mean: model2vec leaves unknown words out."""


def is_static(folder: Path) -> bool:
    """Whether the folder's first module is a StaticEmbedding, or it is a plain model2vec folder."""
    modules = folder / "modules.json"
    if modules.exists():
        return [str(entry["type"]).rsplit(".", 1)[-1] for entry in read_json(modules)][:1] == [
            MODULE
        ]
    config = folder / "config.json"
    return config.exists() and read_json(config).get("model_type") == MODEL2VEC


def load(folder: Path, name: str) -> Any:
    """The model in `folder` as a SentenceTransformer on the CPU.

    Raises:
        InvalidModel: its tokenizer or its table is missing or damaged.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    if not _is_read_by_model2vec(folder):
        try:
            return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        except Exception as error:  # tokenizers, safetensors and torch each raise their own
            raise InvalidModel(
                f"{name} cannot be read ({type(error).__name__}): its tokenizer.json or its table "
                "is missing or damaged. Fetch the folder again."
            ) from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"{name}: tokenizer.json is missing or damaged.") from error
    module: Any = StaticEmbedding(tokenizer, embedding_weights=_model2vec(folder, name))
    module.left_out = _unknown(tokenizer)
    config = read_json(folder / "config.json")
    if config.get("max_length"):
        tokenizer.enable_truncation(int(config["max_length"]))
    normalise = [Normalize()] if config.get("normalize") else []
    return SentenceTransformer(modules=[module, *normalise], device="cpu")


def own_limit(model: Any) -> int:
    """The token limit of a loaded static model, or MAX_TOKENS if its folder names none."""
    truncation = model[0].tokenizer.truncation
    return int(truncation["max_length"]) if truncation else MAX_TOKENS


def limit(model: Any, max_tokens: int) -> None:
    """Set the token limit of a loaded static model, which `own_limit` then gives."""
    direction = (model[0].tokenizer.truncation or {}).get("direction", "right")
    model[0].tokenizer.enable_truncation(max_tokens, direction=direction)


def table(model: Any) -> Table:
    """The table of a loaded static model."""
    embedding = model[0].embedding.weight.detach().float()
    return Table(embedding, getattr(model[0], "left_out", None))


def tokenizer_json(model: Any) -> str:
    """The text of tokenizer.json: no special tokens, and the model's token limit."""
    from tokenizers import Tokenizer

    fields = json.loads(model[0].tokenizer.to_str())
    fields["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.no_padding()
    return str(tokenizer.to_str(pretty=True))


def reference(model: Any, texts: list[str]) -> Any:
    """The embeddings of the texts: `[len(texts), dims]` float32.

    sentence-transformers gives them, but for what model2vec leaves out.
    """
    import numpy as np

    left_out = getattr(model[0], "left_out", None)
    if left_out is None:
        return np.asarray(model.encode(texts, show_progress_bar=False))
    vectors = model[0].embedding.weight.detach().numpy()
    rows = []
    for encoding in model[0].tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = [token for token in encoding.ids if token != left_out]
        rows.append(vectors[ids].mean(axis=0) if ids else np.zeros(vectors.shape[1], np.float32))
    means = np.stack(rows)
    if len(model) == 1:
        return means
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def counter(model: Any) -> Callable[[str], int]:
    """A function that counts the tokens of a whole text, those beyond the limit included."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json(model))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def _is_read_by_model2vec(folder: Path) -> bool:
    """Whether the folder is one that sentence-transformers does not read, or not as model2vec."""
    from safetensors import safe_open

    weights = folder / "model.safetensors"
    if not (folder / "modules.json").exists():
        return True
    if not (folder / "config.json").exists() or not weights.exists():
        return False
    try:
        with safe_open(weights, "np") as tensors:
            return bool({"mapping", "weights"} & set(tensors.keys()))
    except Exception:  # a damaged file; whoever reads it next names it
        return False


def _model2vec(folder: Path, name: str) -> Any:
    """The table of a model2vec folder: one vector for each token, its weight multiplied in."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "model.safetensors")
        vectors = tensors["embeddings"].float()
    except Exception as error:  # safetensors raises an undocumented class of its own
        raise InvalidModel(
            f"{name}: model.safetensors has no readable tensor `embeddings`, as model2vec has."
        ) from error
    if "mapping" in tensors:
        vectors = vectors[tensors["mapping"].long()]
    if "weights" in tensors:
        vectors = vectors * tensors["weights"].float()[:, None]
    return vectors


def _unknown(tokenizer: Any) -> int | None:
    """Id of the tokenizer's token for unknown words; None if it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    if token is None and model.get("unk_id") is not None:
        return int(model["unk_id"])
    return None if token is None else tokenizer.token_to_id(token)
