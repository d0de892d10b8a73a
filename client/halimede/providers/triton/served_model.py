"""The model that a Triton model config describes, from the config's parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from halimede.inputs.content import ModelKind, OutputKind
from halimede.providers.input_kinds import input_of
from halimede.results import MAX_IMAGE_BYTES, ServedModel
from halimede_repository import configs

OUTPUTS: Mapping[str, OutputKind] = {
    "EMBEDDING": "vector",
    "SCORE": "scores",
    "SCORES": "scores",
    "SPARSE_IDS": "sparse",
    "MULTI_VECTORS": "multi",
    "SPAN_EMBEDDINGS": "spans",
}
"""Output of an ensemble → what it is."""


def from_config(config: Any) -> ServedModel | None:
    """Return the model that a `ModelConfig` message describes. None for a step of a model."""
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    versions = list(config.version_policy.specific.versions)
    if "space" not in parameters:
        return None
    cosine = parameters.get("mean_cosine")
    kind = cast(ModelKind, parameters.get("kind", "dense"))
    names = [output.name for output in config.output]
    # Only a number that is derived from the content identifies it; 1 is just the first version.
    is_pinned = len(versions) == 1 and int(versions[0]) > 1
    return ServedModel(
        name=config.name,
        space=parameters["space"],
        precision=parameters["precision"],
        dims=int(parameters["dims"]),
        max_tokens=int(parameters.get("max_tokens", 0)),
        max_batch_size=config.max_batch_size,
        mean_cosine=None if cosine is None else float(cosine),
        version=str(versions[0]) if is_pinned else "",
        input=input_of(kind, parameters.get("input", "")),
        image_model=parameters.get("image_model", ""),
        max_image_bytes=int(parameters.get("max_image_bytes", MAX_IMAGE_BYTES)),
        share=float(parameters.get(configs.SHARE, 0)),
        kind=kind,
        query_tokens=int(parameters.get("query_tokens", 0)),
        outputs=tuple(output for name, output in OUTPUTS.items() if name in names),
        labels=tuple(json.loads(parameters.get("labels", "[]"))),
    )
