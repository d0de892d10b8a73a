"""The model that a Triton model config describes, from the config's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halimede.providers.input_kinds import BY_PARAMETER
from halimede.results import MAX_IMAGE_BYTES, ServedModel
from halimede_repository import configs


def from_message(config: Any) -> ServedModel | None:
    """Return the model that a `ModelConfig` message describes, from gRPC. None for a step."""
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    versions = list(config.version_policy.specific.versions)
    return _from_facts(config.name, config.max_batch_size, parameters, versions)


def from_json(config: dict[str, Any]) -> ServedModel | None:
    """Return the model that a config as JSON describes, from HTTP. None for a step."""
    items = config.get("parameters", {}).items()
    parameters = {key: value["string_value"] for key, value in items}
    versions = config.get("version_policy", {}).get("specific", {}).get("versions", [])
    return _from_facts(config["name"], config["max_batch_size"], parameters, versions)


def _from_facts(
    name: str, max_batch_size: int, parameters: Mapping[str, str], versions: Sequence[int]
) -> ServedModel | None:
    """The model of a config's parameters. A step of a model has none of them."""
    if "space" not in parameters:
        return None
    cosine = parameters.get("mean_cosine")
    # Only a number that is derived from the content identifies it; 1 is just the first version.
    is_pinned = len(versions) == 1 and int(versions[0]) > 1
    return ServedModel(
        name=name,
        space=parameters["space"],
        precision=parameters["precision"],
        dims=int(parameters["dims"]),
        max_tokens=int(parameters.get("max_tokens", 0)),
        max_batch_size=max_batch_size,
        mean_cosine=None if cosine is None else float(cosine),
        version=str(versions[0]) if is_pinned else "",
        input=BY_PARAMETER[parameters.get("input", "text")],
        image_model=parameters.get("image_model", ""),
        max_image_bytes=int(parameters.get("max_image_bytes", MAX_IMAGE_BYTES)),
        share=float(parameters.get(configs.SHARE, 0)),
    )
