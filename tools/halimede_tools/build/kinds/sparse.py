"""Sparse: the facts of models that give a weight for each token of a vocabulary.

SPLADE's weights are the pooled logits of a model for masked language modelling. A sparse
auto-encoder gives the weights of its own hidden dimensions instead, from the vector of a dense
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import SPARSE_KIND
from halimede_tools.build.kinds import recognise
from halimede_tools.build.kinds.files import read_json

SPLADE = (("Transformer", "SpladePooling"), ("MLMTransformer", "SpladePooling"))
"""The modules of a SPLADE folder."""
AUTO_ENCODER = "SparseAutoEncoder"
MASKED_LM = "ForMaskedLM"
"""Ends the names of classes that have a logit for each token of the vocabulary."""
MAX_ACTIVE_DIMS = "max_active_dims"
"""Key of config_sentence_transformers.json: how many of the largest weights are kept."""


def check_folder(folder: Path, modules: Sequence[str], name: str, kind: str) -> None:
    """Raise unless the modules of a folder are those of its kind.

    Raises:
        InvalidModel: a sparse model has other modules or no weights for PyTorch, or a model of
            another kind has modules of a sparse one.
    """
    if kind != SPARSE_KIND:
        if set(modules) & set(recognise.SPARSE_MODULES):
            raise InvalidModel(
                f"{name} has the modules {', '.join(modules)}, which give a weight for each token "
                f"of the vocabulary. Pass --kind {SPARSE_KIND}, or no kind."
            )
        return
    if not modules:
        architecture = _architecture(folder)
        if not architecture.endswith(MASKED_LM):
            raise InvalidModel(
                f"{name} is a {architecture or 'model without a named class'}, which has no logits "
                f"of a vocabulary. A {SPARSE_KIND} model is a class that ends with {MASKED_LM}, or "
                "a folder that SparseEncoder saved."
            )
    elif tuple(modules) not in SPLADE and modules[-1] != AUTO_ENCODER:
        raise InvalidModel(
            f"{name} has the modules {', '.join(modules)}; a {SPARSE_KIND} model has "
            f"{' and '.join(SPLADE[0])}, or ends with {AUTO_ENCODER}."
        )
    if not [*folder.rglob("*.safetensors"), *folder.rglob("pytorch_model*.bin")]:
        raise InvalidModel(
            f"{name} has no weights for PyTorch. A {SPARSE_KIND} model is built from these alone, "
            "not from a ready-made ONNX file."
        )


def load_options(folder: Path, kind: str) -> dict[str, Any]:
    """What a SparseEncoder is told besides its folder. The library reads MAX_ACTIVE_DIMS from no
    file.
    """
    path = folder / recognise.SENTENCE_TRANSFORMERS
    config = read_json(path) if kind == SPARSE_KIND and path.exists() else {}
    return {MAX_ACTIVE_DIMS: config[MAX_ACTIVE_DIMS]} if config.get(MAX_ACTIVE_DIMS) else {}


def facts(model: Any, name: str, kind: str) -> dict[str, Any]:
    """The fields of a ModelSpec that a sparse model has besides; none for others.

    Raises:
        InvalidModel: the transformer has no last layer that gives logits of a vocabulary.
    """
    if kind != SPARSE_KIND:
        return {}
    if type(list(model)[-1]).__name__ == AUTO_ENCODER:
        return {"kind": SPARSE_KIND, "dims": int(model.get_embedding_dimension())}
    transformer = model[0].auto_model
    decoder = transformer.get_output_embeddings()
    if not hasattr(decoder, "out_features"):
        raise InvalidModel(
            f"{name} is a {type(transformer).__name__}, whose logits do not come from one linear "
            "layer. This architecture is not supported."
        )
    return {"kind": SPARSE_KIND, "dims": int(decoder.out_features)}


def _architecture(folder: Path) -> str:
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    return str((config.get("architectures") or [""])[0])
