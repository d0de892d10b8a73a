"""Activation: what turns the logits of a cross-encoder or classifier into its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halimede_ops.errors import UntrustedCode
from halimede_ops.spec import CLASSIFIER
from halimede_tools.build.kinds import recognise
from halimede_tools.build.kinds.files import read_json

OWN = "torch."
"""Begins the names of the activations that sentence-transformers uses without being trusted."""


def activation(model: Any, folder: Path, kind: str) -> Any:
    """The module between the logits of a CrossEncoder and its scores.

    A reranker, and a classifier whose folder names an activation, have that of sentence-
    transformers. Any other classifier has that of transformers' pipeline: probabilities that sum
    to 1, or one for each label if the model was trained for several labels at a time.
    """
    import torch

    if kind != CLASSIFIER or named(folder):
        return model.activation_fn
    problem = getattr(model[0].auto_model.config, "problem_type", None)
    if problem == "regression":
        return torch.nn.Identity()
    return torch.nn.Sigmoid() if problem == "multi_label_classification" else torch.nn.Softmax(-1)


def named(folder: Path) -> str:
    """The name of the activation's class in the folder's configs; empty if they name none."""
    for path in (folder / recognise.SENTENCE_TRANSFORMERS, folder / "config.json"):
        config = read_json(path) if path.exists() else {}
        name = (
            config.get("activation_fn")
            or (config.get("sentence_transformers") or {}).get("activation_fn")
            or config.get("sbert_ce_default_activation_function")
        )
        if name:
            return str(name)
    return ""


def check_trusted(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Raise unless the activations that the folder names may be used: that of the scores, and those
    of Dense layers.

    Raises:
        UntrustedCode: it is a class of another package, and the user does not trust it.
    """
    dense = [read_json(path) for path in sorted(folder.rglob("*/config.json"))]
    layers = [config for config in dense if "in_features" in config]
    names = [named(folder), *(layer.get("activation_function") for layer in layers)]
    if not trust_remote_code and not all(str(one or OWN).startswith(OWN) for one in names):
        raise UntrustedCode(
            f"{name} names an activation that is not of torch. With another one, what it gives "
            "would differ. Read it, then pass --trust-remote-code."
        )
