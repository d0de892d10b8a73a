"""Describe: a model's folder to its ModelSpec, read from the files sentence-transformers reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import ModelSpec
from tools.steps import sha256

KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def describe(folder: Path, name: str) -> ModelSpec:
    """The ModelSpec of the model in `folder`, served as `name`.

    Raises:
        InvalidModel: a file is missing, or the folder has a module that is not supported.
    """
    modules = [entry["type"].rsplit(".", 1)[-1] for entry in _json(folder / "modules.json")]
    for module in modules:
        if module not in KNOWN_MODULES:
            raise InvalidModel(
                f"{name} has a module {module}; supported are {', '.join(KNOWN_MODULES)}."
            )
    dims = int(_json(folder / "config.json")["hidden_size"])
    max_tokens = int(_json(folder / "sentence_bert_config.json")["max_seq_length"])
    settings = _json(folder / "config_sentence_transformers.json")
    prompts = {"query": "", "document": "", **(settings.get("prompts") or {})}
    fields: dict[str, Any] = {
        "dims": dims,
        "max_tokens": max_tokens,
        "normalised": "Normalize" in modules,
        "prompts": prompts,
        "default_input_type": settings.get("default_prompt_name"),
    }
    return ModelSpec(
        name=name,
        space=_space(folder, fields),
        length_buckets=length_buckets(max_tokens),
        **fields,
    )


def length_buckets(max_tokens: int) -> tuple[int, ...]:
    """Powers of two from 16 below `max_tokens`, then `max_tokens`."""
    buckets = [16]
    while buckets[-1] * 2 < max_tokens:
        buckets.append(buckets[-1] * 2)
    return (*[size for size in buckets if size < max_tokens], max_tokens)


def _space(folder: Path, fields: dict[str, Any]) -> str:
    """Fingerprint of all that decides a vector: equal spaces give comparable vectors."""
    poolings = {
        str(path.relative_to(folder)): _json(path)
        for path in sorted(folder.glob("*_Pooling/config.json"))
    }
    decides = {
        "weights": sha256(folder / "model.safetensors"),
        "tokenizer": sha256(folder / "tokenizer.json"),
        "poolings": poolings,
        **fields,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{path.name} of the model is missing or not JSON") from error
