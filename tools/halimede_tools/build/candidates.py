"""Candidates: versions that lie in the repository beside the one that is served under a name.

A candidate is an ensemble of its own, `<name>-candidate`, with steps of its own: nothing of what is
served is touched before it takes its place. Its version folders lie under the name already, for the
day that it does.
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
    """Write what was built beside the ensembles of its names; the names of the candidates.

    Raises:
        DeployError: nothing of it is served, all of it is served already, or another candidate
            waits.
        InvalidModel: what is served was written without what it needs to be served again.
    """
    served = {name: repository.served(folder / name) for name in built.names}
    if not any(served.values()):
        raise DeployError(
            f"{built.name} is not in the repository, so nothing can follow it. Build it without "
            "--candidate."
        )
    changed = {
        precision: model
        for precision, model in built.models.items()
        if served[served_name(built.name, precision)] - {built.version(precision)}
    }
    if not changed:
        raise DeployError(f"{built.name} is served in this very version already.")
    new = dataclasses.replace(built, models=changed)
    before = {name: version for name in new.names for version in served[name]}
    repository.steps(before, folder)  # raises where there is no way back
    beside = dataclasses.replace(new, suffix=configs.CANDIDATE)
    for name, version in found(new.names, folder).items():
        if version != new.versions[name]:
            raise DeployError(
                f"{name} has a candidate already, version {version}. Promote it or roll it back."
            )
    repository.place(new, folder)
    repository.place(beside, folder)
    repository.add(beside.versions, folder)
    shares = {name: share(name, folder) for name in new.names}
    for name, version in beside.versions.items():
        repository.switch({name: version}, folder, shares[name.removesuffix(configs.CANDIDATE)])
    return beside.names


def names(model: str, folder: Path) -> list[str]:
    """The ensembles of a model: those of every precision, of its texts and its images."""
    every = [served_name(model + part, one) for part in ("", IMAGE_SUFFIX) for one in SUFFIXES]
    return [name for name in every if repository.served(folder / name)]


def found(models: Iterable[str], folder: Path) -> dict[str, int]:
    """Name of an ensemble → version of its candidate, of those that have one."""
    return {
        name: version for name in models for version in repository.served(folder / beside(name))
    }


def share(name: str, folder: Path) -> float:
    """The share of an ensemble's requests that its candidate answers; 0 where there is none."""
    path = folder / beside(name) / configs.CONFIG
    return float(configs.parameter(path.read_text(), configs.SHARE) or 0) if path.exists() else 0.0


def give(candidates: Mapping[str, int], share: float, folder: Path) -> None:
    """Give candidates this share of what their ensembles are asked."""
    repository.switch({beside(name): v for name, v in candidates.items()}, folder, share)


def remove(candidates: Mapping[str, int], folder: Path) -> None:
    """Remove candidates from disk: steps first, so that one that is left can be removed again."""
    versions = {beside(name): version for name, version in candidates.items()}
    steps = {pin.model for pin in repository.steps(versions, folder)}
    for name in (*sorted(steps), *versions):
        (folder / name / configs.CONFIG).unlink(missing_ok=True)
        shutil.rmtree(folder / name, ignore_errors=True)


def beside(name: str) -> str:
    """Name of an ensemble's candidate."""
    return name + configs.CANDIDATE
