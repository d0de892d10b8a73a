"""Recognise: the kind of the model in a folder, from what the folder's own files say.

The files are read as sentence-transformers reads them: `config_sentence_transformers.json` names
the class that saved the folder, `modules.json` its modules, and `config.json` the class of a plain
transformers model. A plain model without a head is embedded by the mean of its tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halimede_ops.errors import InvalidInput, InvalidModel
from halimede_ops.spec import (
    CLASSIFIER,
    DENSE,
    KINDS,
    LATE_INTERACTION,
    RERANKER,
    SPARSE_KIND,
)
from halimede_tools.build.kinds.files import read_json

SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
SPARSE_MODULES = ("SpladePooling", "SparseStaticEmbedding", "SparseAutoEncoder")
COLBERT_FILE = "artifact.metadata"
"""File of a ColBERT checkpoint with its markers and lengths."""
COLBERT_ARCHITECTURES = ("HF_ColBERT", "ColBERT")
OTHER_HEADS = (
    "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    "ForNextSentencePrediction", "ForImageClassification", "ForObjectDetection",
)  # fmt: skip
"""Ends of the names of classes whose head answers something else than retrieval asks."""


TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model")
PREPROCESSING = "preprocessor_config.json"


def takes_images_alone(folder: Path) -> bool:
    """Whether the folder's model takes images and no texts, as ViT: it has no tokenizer, and either
    says how images are prepared or has a config with a number of channels.
    """
    if any(any(folder.rglob(pattern)) for pattern in TOKENIZER_FILES):
        return False
    config = _json(folder / "config.json")
    return "num_channels" in config or any(folder.rglob(PREPROCESSING))


def recognise(folder: Path, name: str, kind: str | None = None) -> str:
    """The kind of the model in `folder`: `kind` if it is given, else what the files say.

    Raises:
        InvalidInput: `kind` is unknown.
        InvalidModel: the model has a head that is not supported, or a file is damaged.
    """
    if kind is not None:
        if kind not in KINDS:
            raise InvalidInput(f"kind is {kind!r}; use {', '.join(KINDS)}.")
        return kind
    if takes_images_alone(folder):
        return DENSE
    config = _json(folder / "config.json")
    saved = _json(folder / SENTENCE_TRANSFORMERS)
    modules = module_names(folder)
    if _is_late_interaction(folder, config, saved, modules):
        return LATE_INTERACTION
    if saved.get("model_type") == "SparseEncoder" or set(modules) & set(SPARSE_MODULES):
        return SPARSE_KIND
    if saved.get("model_type") == "CrossEncoder":
        return _scoring_kind(folder, config)
    if modules:
        return DENSE
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return _scoring_kind(folder, config)
    if architecture.endswith(OTHER_HEADS):
        raise InvalidModel(
            f"{name} is a {architecture}: its head gives no vectors and no scores of texts. Pass "
            f"--kind {DENSE} to leave the head out and embed by the mean of the tokens."
        )
    return DENSE


def _is_late_interaction(
    folder: Path, config: dict[str, Any], saved: dict[str, Any], modules: list[str]
) -> bool:
    architecture = str((config.get("architectures") or [""])[0])
    return (
        saved.get("model_type") == "ColBERT"
        or "skiplist_words" in saved  # PyLate
        or any(module.startswith("pylate.") for module in modules)
        or architecture in COLBERT_ARCHITECTURES
        or (folder / COLBERT_FILE).exists()
    )


def _scoring_kind(folder: Path, config: dict[str, Any]) -> str:
    """A reranker has one score; a decoder that answers yes or no has one too."""
    if not config:  # the folder of a CrossEncoder with several modules
        inner = [_json(path) for path in sorted(folder.glob("*/config.json"))]
        config = next((config for config in inner if "architectures" in config), {})
    architecture = str((config.get("architectures") or [""])[0])
    labels = len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)
    is_reranker = labels == 1 or not architecture.endswith("ForSequenceClassification")
    return RERANKER if is_reranker else CLASSIFIER


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}


def module_names(folder: Path) -> list[str]:
    """The modules of a sentence-transformers folder: the name of a class of that library, the
    whole path of any other.
    """
    path = folder / "modules.json"
    types = [str(module["type"]) for module in read_json(path)] if path.exists() else []
    return [
        kind.rsplit(".", 1)[-1] if kind.startswith("sentence_transformers.") else kind
        for kind in types
    ]
