"""Which models and version folders of a repository are served: read from its config.pbtxt files.

The client reads them as Triton does, without Triton's messages and the packages they need.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from halimede_ops.errors import ModelNotFound

CONFIG = "config.pbtxt"
ONE_PROCESS = "one_process"
"""Name of the second config of an ensemble's folder: Triton takes `configs/one_process.pbtxt`
instead of config.pbtxt when it is started with `--model-config-name=one_process`."""
CANDIDATE = "-candidate"
"""Behind a model's name: the ensemble that may follow it, served beside it."""
SHARE = "share"
"""Parameter of a candidate's config: the share of its model's requests that it answers."""
_POLICY = re.compile(r"\bversion_policy\s*:?\s*\{\s*specific\s*:?\s*\{([^}]*)\}")
_STEP = re.compile(r'\bmodel_name:\s*"([^"]+)"\s*model_version:\s*(-?\d+)')


class Served(NamedTuple):
    """An ensemble as its config tells it at one moment."""

    config: str
    """Text of its config.pbtxt."""
    folder: Path
    """Its version folder."""
    steps: dict[str, Path]
    """Step → the version folder that it pins."""


def read(repository: Path, name: str) -> Served:
    """The ensemble's config, and the folders that it says are served.

    Raises:
        ModelNotFound: the repository has no such model, or nothing to serve for its config.
    """
    try:
        config = (repository / name / CONFIG).read_text("utf-8")
        folder = _folder(repository / name, max(versions(config), default=-1))
        pinned = {step: _folder(repository / step, one) for step, one in steps(config).items()}
    except (OSError, LookupError):
        raise not_built(name) from None
    return Served(config, folder, pinned)


def not_built(name: str) -> ModelNotFound:
    """The error for a model that a repository does not have, or not whole."""
    return ModelNotFound(
        f"the repository has no built model {name!r}. Run `make build`, or set path (or "
        "HALIMEDE_REPOSITORY) to the folder that has it."
    )


def versions(config: str) -> list[int]:
    """Versions that a config's policy names; none where it has no such policy."""
    policy = _POLICY.search(config)
    return [int(number) for number in re.findall(r"\d+", policy[1])] if policy else []


def steps(config: str) -> dict[str, int]:
    """Step → version that an ensemble's config pins; -1: the highest."""
    return {name: int(version) for name, version in _STEP.findall(config)}


def parameter(config: str, name: str) -> str:
    """The string value of one of a config's parameters; empty where it has none of this name."""
    found = re.search(rf'\bkey:\s*"{name}"\s*value\s*:?\s*{{\s*string_value:\s*"([^"]*)"', config)
    return found[1] if found else ""


def to_load(repository: Path, models: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The models asked for, without any all that are no step of another: an ensemble loads its
    steps itself. Of their candidates those that answer a share: what was only published may not
    even load.
    """
    configs = {path.parent.name: path.read_text() for path in repository.glob(f"*/{CONFIG}")}
    within = {step for config in configs.values() for step in steps(config)}
    candidates = {name for name in configs if name.endswith(CANDIDATE)}
    asked = set(models) or configs.keys() - within - candidates
    follow = {f"{name}{CANDIDATE}" for name in asked} & candidates
    taking = {name for name in follow if float(parameter(configs[name], SHARE) or 0)}
    return tuple(sorted(asked | taking))


def present(model: Path) -> list[int]:
    """Version folders that a model has, ascending."""
    return sorted(int(path.name) for path in model.glob("[0-9]*") if path.name.isdecimal())


def is_built(model: Path) -> bool:
    """Whether a model has a config, and every version that it names; without names, any."""
    found = present(model)
    try:
        named = versions((model / CONFIG).read_text("utf-8"))
    except OSError:
        return False
    return bool(found) and set(named) <= set(found)


def _folder(model: Path, version: int) -> Path:
    """A version's folder; for -1 the highest there is: Triton's own default."""
    return model / str(version if version > 0 else present(model)[-1])
