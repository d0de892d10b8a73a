"""Traced: whether a graph computes every text as the model does, and why some models have no such
graph.

A traced graph has the operations that one text took. A model that chooses its operations by the
text gives a graph that fails for other texts, or computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from halimede_ops import vectors
from halimede_ops.errors import BuildError
from halimede_ops.spec import POOLED, TOKEN_TYPES

TEXTS = (
    ("word",),
    (
        "A short text.",
        "Another one has some more words, so that both are padded to its length.",
        "three words only",
    ),
)
"""Batches of other shapes than the one that is traced."""
LEAST_COSINE = 0.99
"""Below it a graph is of another model. Smaller differences are left to the build's check."""
INPUTS = ("input_ids", "attention_mask", TOKEN_TYPES)


def check(opened: Any, model: Any, name: str) -> None:
    """Raise unless an opened graph gives the vectors of its model for batches of other shapes.

    `opened` is an InferenceSession of onnxruntime, `model` a SentenceTransformer of texts.

    Raises:
        BuildError: it fails, or gives other vectors.
    """
    import torch

    taken = {node.name for node in opened.get_inputs()}
    for texts in TEXTS:
        features = model.preprocess(list(texts))
        feeds = {key: features[key].numpy() for key in INPUTS if key in features and key in taken}
        with torch.no_grad():
            expected = model(features)[POOLED].numpy()
        try:
            [given] = opened.run([POOLED], feeds)
        except Exception as error:  # onnxruntime raises undocumented classes of its own
            raise not_traced(name, _config(model), None) from error
        if given.shape != expected.shape or _is_other(given, expected):
            raise not_traced(name, _config(model), None)


def _is_other(given: np.ndarray, expected: np.ndarray) -> bool:
    is_finite = bool(np.isfinite(given).all() and np.isfinite(expected).all())
    return is_finite and bool(vectors.cosine(given, expected).min() < LEAST_COSINE)


def _config(model: Any) -> Mapping[str, Any]:
    return dict(model[0].auto_model.config.to_dict())


def not_traced(name: str, config: Mapping[str, Any], error: Exception | None) -> BuildError:
    """The error of a model without a graph for every text.

    Args:
        name: the model's name.
        config: of its transformer; empty if it has none.
        error: what a library raised while it traced. None: the graph is of the traced shape alone.
    """
    return BuildError(
        f"{name} cannot be traced to a graph, because {_cause(config, error)}. Models that compute "
        "every text alike can be built, such as those of BERT's, T5's or Llama's kind."
    )


def _cause(config: Mapping[str, Any], error: Exception | None) -> str:
    kind, words = str(config.get("model_type", "")), " ".join(str(error or "").split())
    if isinstance(error, TypeError) and "attention_mask" in words:
        return f"{kind} takes no attention_mask, so that padding would change its vectors"
    if error is None:
        return (
            f"the code of {kind or 'its architecture'} computes with the numbers of texts and "
            "tokens, and a graph has those of the texts that were traced"
        )
    return f"its code is not of ONNX's operations alone ({type(error).__name__}: {words[:160]})"
