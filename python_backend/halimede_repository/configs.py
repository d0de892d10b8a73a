"""Which models and version folders of a repository are served, read from its config.pbtxt files.

The client reads the same files as Triton, without Triton's protobuf messages and the packages that
they need.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from halimede_ops.errors import ModelNotFound

CONFIG = "config.pbtxt"
ONE_PROCESS = "one_process"
"""Name of an ensemble's second config. Triton reads `configs/one_process.pbtxt` instead of
config.pbtxt if it is started with `--model-config-name=one_process`."""
CANDIDATE = "-candidate"
"""Suffix of a candidate: the ensemble that may replace a model and is served beside it."""
MAXSIM = "-maxsim"
"""Suffix of the model that scores pairs of a query and a document by an ensemble's multi-vectors.
"""
ALIASES = {"-litellm": "input_text", "-llamaindex": "INPUT_TEXT"}
"""Suffix of an alias → its input. LiteLLM's provider `triton/` and LlamaIndex's
`embeddings-nvidia-triton` send texts in this input, as `[texts]` instead of `[texts, 1]`."""
SHARE = "share"
"""Parameter of a candidate's config: its canary share, the fraction of the model's requests that it
answers."""
TOWERS = ("query_model", "document_model")
"""Parameters of a router's config: the models that it calls."""
_POLICY = re.compile(r"\bversion_policy\s*:?\s*\{\s*specific\s*:?\s*\{([^}]*)\}")
_STEP = re.compile(r'\bmodel_name:\s*"([^"]+)"\s*model_version:\s*(-?\d+)')


class Ensemble(NamedTuple):
    """An ensemble, as its config described it when it was read."""

    config: str
    """Text of its config.pbtxt."""
    folder: Path
    """The version folder that is served."""
    steps: dict[str, Path]
    """Step → the version folder that the ensemble pins."""


def read(repository: Path, name: str) -> Ensemble:
    """Read the config of an ensemble, and find the folders that it serves.

    Raises:
        ModelNotFound: the repository has no such model, or lacks a folder that its config names.
    """
    try:
        config = (repository / name / CONFIG).read_text("utf-8")
        folder = _folder(repository / name, max(versions(config), default=-1))
        pinned = {
            step: _folder(repository / step, version) for step, version in steps(config).items()
        }
    except (OSError, LookupError):
        raise not_built(name) from None
    return Ensemble(config, folder, pinned)


def not_built(name: str) -> ModelNotFound:
    """The error for a model that a repository does not have, or has only in part."""
    return ModelNotFound(
        f"the repository has no built model {name!r}. Run `make build`, or set path (or "
        "HALIMEDE_REPOSITORY) to the folder that has it."
    )


def versions(config: str) -> list[int]:
    """Versions that a config's version policy names; empty if it names none."""
    policy = _POLICY.search(config)
    return [int(number) for number in re.findall(r"\d+", policy[1])] if policy else []


def steps(config: str) -> dict[str, int]:
    """Step → version that an ensemble's config pins; -1 is the highest."""
    return {name: int(version) for name, version in _STEP.findall(config)}


def parameter(config: str, name: str) -> str:
    """The string value of a parameter in a config; empty if it has no such parameter."""
    match = re.search(rf'\bkey:\s*"{name}"\s*value\s*:?\s*{{\s*string_value:\s*"([^"]*)"', config)
    return match[1] if match else ""


def models_to_load(repository: Path, models: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the models that Triton must load, in order.

    These are `models`, or, if it is empty, every model that is no step of another and no candidate:
    an ensemble loads its steps itself. The models that a router calls are added, and the candidates
    of all if they have a canary share; a candidate that was only published might not load.
    """
    configs = {path.parent.name: path.read_text() for path in repository.glob(f"*/{CONFIG}")}
    # An alias pins no version: what it calls is no step, but a model of its own.
    all_steps = {
        step for config in configs.values() for step, pin in steps(config).items() if pin > 0
    }
    candidates = {name for name in configs if name.endswith(CANDIDATE)}
    requested = set(models) or configs.keys() - all_steps - candidates
    requested |= {parameter(configs.get(name, ""), key) for name in requested for key in TOWERS} - {
        ""
    }
    own_candidates = {f"{name}{CANDIDATE}" for name in requested} & candidates
    canaries = {name for name in own_candidates if float(parameter(configs[name], SHARE) or 0)}
    return tuple(sorted(requested | canaries))


def stored_versions(model: Path) -> list[int]:
    """Versions of a model that have a folder, ascending."""
    return sorted(int(path.name) for path in model.glob("[0-9]*") if path.name.isdecimal())


def is_built(model: Path) -> bool:
    """Whether a model has a config and a folder for each version that it names, or for any."""
    stored = stored_versions(model)
    try:
        named = versions((model / CONFIG).read_text("utf-8"))
    except OSError:
        return False
    return bool(stored) and set(named) <= set(stored)


def _folder(model: Path, version: int) -> Path:
    """The folder of a version; for -1 that of the highest one, which is Triton's default."""
    return model / str(version if version > 0 else stored_versions(model)[-1])
