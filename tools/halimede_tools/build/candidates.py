"""Candidates: versions in the repository beside the one that is served under a name.

A candidate is a separate ensemble, `<name>-candidate`, with its own steps, so nothing that is
served changes before the candidate is promoted. Its version folders are also placed under the
model's name, where promotion finds them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from halimede_ops.errors import DeployError
from halimede_repository import configs
from halimede_tools.build import repository
from halimede_tools.build.repository import IMAGE_SUFFIX, SUFFIXES, Built, served_name


def write(built: Built, folder: Path) -> list[str]:
    """Write a built tower as candidates of its ensembles; the names of the candidates.

    Raises:
        DeployError: none of its ensembles is served, all are served in this version already, or
            another candidate is there.
        InvalidModel: a served version has no config in its folder, so it could not be rolled back
            to.
    """
    served = {name: repository.served(folder / name) for name in built.names}
    if not any(served.values()):
        raise _nothing_served(built.name)
    new = dataclasses.replace(built, models=changed(built, folder))
    if not new.models:
        same = ", ".join(name for name in built.names if served[name])
        raise DeployError(
            f"no candidate was written: {same} {'is' if ',' not in same else 'are'} served in this "
            "very version already."
        )
    before = {name: version for name in new.names for version in served[name]}
    repository.steps(before, folder)  # raises if a rollback would not be possible
    candidate = dataclasses.replace(new, suffix=configs.CANDIDATE)
    for name, version in versions(new.names, folder).items():
        if version != new.versions[name]:
            raise DeployError(
                f"{name} has a candidate already, version {version}. Promote it or roll it back."
            )
    repository.place(new, folder)
    repository.place(candidate, folder)
    repository.add(candidate.versions, folder)
    shares = {name: share(name, folder) for name in new.names}
    for name, version in candidate.versions.items():
        repository.switch({name: version}, folder, shares[name.removesuffix(configs.CANDIDATE)])
    return candidate.names


def changed(built: Built, folder: Path) -> dict[str, Path]:
    """The precisions of a built tower that are served in another version, as `Built.models`."""
    return {
        precision: model
        for precision, model in built.models.items()
        if repository.served(folder / served_name(built.name, precision))
        - {built.version(precision)}
    }


def check_served(model: str, folder: Path) -> None:
    """Raise unless a candidate of a model has something to follow.

    Raises:
        DeployError: the repository serves no ensemble of the model.
    """
    if not ensembles(model, folder):
        raise _nothing_served(model)


def _nothing_served(model: str) -> DeployError:
    return DeployError(
        f"{model} is not in the repository, so nothing can follow it. Build it without --candidate."
    )


def ensembles(model: str, folder: Path) -> list[str]:
    """The served ensembles of a model: every precision, of its texts and its images."""
    names = [
        served_name(model + tower, precision)
        for tower in ("", IMAGE_SUFFIX)
        for precision in SUFFIXES
    ]
    return [name for name in names if repository.served(folder / name)]


def versions(models: Iterable[str], folder: Path) -> dict[str, int]:
    """Ensemble → version of its candidate, for those that have one."""
    return {
        name: version
        for name in models
        for version in repository.served(folder / candidate_name(name))
    }


def share(name: str, folder: Path) -> float:
    """The share of an ensemble's requests that its candidate answers; 0 without a candidate."""
    path = folder / candidate_name(name) / configs.CONFIG
    return float(configs.parameter(path.read_text(), configs.SHARE) or 0) if path.exists() else 0.0


def set_share(candidates: Mapping[str, int], share: float, folder: Path) -> None:
    """Let candidates answer this share of their ensembles' requests."""
    repository.switch({candidate_name(name): v for name, v in candidates.items()}, folder, share)


def remove(candidates: Mapping[str, int], folder: Path) -> None:
    """Remove candidates from disk. Steps go first, so an interrupted removal can be repeated."""
    named = {candidate_name(name): version for name, version in candidates.items()}
    steps = {pin.model for pin in repository.steps(named, folder)}
    for name in (*sorted(steps), *named):
        (folder / name / configs.CONFIG).unlink(missing_ok=True)
        shutil.rmtree(folder / name, ignore_errors=True)


def candidate_name(name: str) -> str:
    """Name of an ensemble's candidate."""
    return name + configs.CANDIDATE
