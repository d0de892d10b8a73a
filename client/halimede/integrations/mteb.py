"""mteb's protocols of encoders and cross-encoders, of mteb 2: what its calls give, and take back.

mteb calls an encoder with batches of a data loader and with the task's metadata.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from halimede.results import ServedModel

TASK = "task_metadata"
"""Argument by which a call of mteb's is known."""
OWN = (TASK, "hf_split", "hf_subset", "prompt_type")
"""Arguments of mteb's calls alone."""


def texts(batches: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the texts of a data loader's batches, in their order."""
    return [text for batch in batches for text in batch["text"]]


def input_type(arguments: MutableMapping[str, Any]) -> str | None:
    """Return the input type of a call's `prompt_type`, and remove mteb's own arguments."""
    given = {name: arguments.pop(name, None) for name in OWN}
    kind = given["prompt_type"]
    return None if kind is None else str(getattr(kind, "value", kind))


def model_meta(model: ServedModel, similarity: str | None) -> Any:
    """Return mteb's description of a served model.

    Raises:
        AttributeError: mteb is not installed, so that programs see an object without one.
    """
    if importlib.util.find_spec("mteb") is None:
        raise AttributeError("mteb_model_meta needs mteb. Run: pip install 'mteb>=2'")
    described = importlib.import_module("mteb.models.model_meta")
    scoring = None if similarity is None else described.ScoringFunction.from_str(similarity)
    return described.ModelMeta.create_empty(
        overwrites={
            "name": f"halimede/{model.name}",
            "revision": "-".join(filter(None, (model.version, model.space))),
            "max_tokens": model.max_tokens,
            "embed_dim": model.dims,
            "framework": ["ONNX", "API"],
            "similarity_fn_name": scoring,
        }
    )
