"""The model store: downloads and built files, one folder a model, bounded in size.

Each model's folder holds one folder a finished build step, with a record of every file's
sha256. What a repository serves is linked to these files and is never evicted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from halimede_ops.errors import InvalidInput
from halimede_repository.checksums import sha256

RECORD = ".done.json"
"""In each finished step's folder: its key, and every file's sha256."""
PART = ".part"
"""Suffix of a step that is being made, or was when its build was killed."""
LOCK = ".lock"
"""Held in a model's folder while the model is built."""
USED = ".used"
"""Its time of change is when the model was last built."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One model in the store."""

    name: str
    size_bytes: int
    used: float
    """When it was last built: seconds since 1970."""
    steps: tuple[str, ...]
    """Finished build steps."""
    served: bool
    """Whether a repository serves its files."""
    building: bool


def stored(models: Path, repository: Path) -> list[Stored]:
    """Every model of the store, the one used last first."""
    found = [_stored(folder, repository) for folder in models.glob("*") if (folder / LOCK).exists()]
    return sorted(found, key=lambda model: model.used, reverse=True)


def verify(models: Path, name: str | None = None) -> dict[str, list[str]]:
    """Files that are missing or not as they were made: model → `step/file`. All of them read.

    Raises:
        InvalidInput: the store has no model of this name.
    """
    if name is not None and not (models / name / LOCK).exists():
        raise InvalidInput(f"{name!r} is not in the store; `halimede store ls` lists what is.")
    folders = [models / name] if name else sorted(path.parent for path in models.glob(f"*/{LOCK}"))
    wrong = {
        folder.name: [f"{step.name}/{file}" for step in _steps(folder) for file in damaged(step)]
        for folder in folders
    }
    return {model: files for model, files in wrong.items() if files}


def prune(
    models: Path, repository: Path, limit_bytes: int, keep: str | None = None
) -> list[Stored]:
    """Evict the models used longest ago until the store fits; those that were evicted.

    Models that are served or being built, and `keep`, stay whatever the size.
    """
    from filelock import FileLock, Timeout

    everything = stored(models, repository)
    size_bytes = sum(model.size_bytes for model in everything)
    evicted = []
    for model in reversed(everything):
        if size_bytes <= limit_bytes:
            break
        if model.served or model.building or model.name == keep:
            continue
        try:
            with FileLock(models / model.name / LOCK, timeout=0):
                shutil.rmtree(models / model.name)
        except Timeout:
            continue
        size_bytes -= model.size_bytes
        evicted.append(model)
    return evicted


def damaged(step: Path) -> list[str]:
    """Files of a finished step that are missing or not as they were made."""
    return [
        name
        for name, digest in recorded(step).items()
        if not (step / name).is_file() or sha256(step / name) != digest
    ]


def recorded(step: Path) -> dict[str, str]:
    """The files of a finished step, each with its sha256; none where the step is not finished."""
    try:
        return dict(json.loads((step / RECORD).read_text())["files"])
    except (OSError, ValueError, KeyError):
        return {}


def _stored(folder: Path, repository: Path) -> Stored:
    files = [path for path in folder.rglob("*") if path.is_file()]
    mark = folder / USED
    return Stored(
        name=folder.name,
        size_bytes=sum(path.stat().st_size for path in files),
        used=(mark if mark.exists() else folder).stat().st_mtime,
        steps=tuple(step.name for step in _steps(folder)),
        served=_is_served(folder, repository),
        building=_is_building(folder),
    )


def _steps(folder: Path) -> Iterator[Path]:
    for record in sorted(folder.glob(f"*/{RECORD}")):
        if not record.parent.name.endswith(PART):
            yield record.parent


def _is_served(folder: Path, repository: Path) -> bool:
    """Whether this repository has its configs, or any repository its files: those are links."""
    if (repository / f"{folder.name}-tokenizer" / "config.pbtxt").exists():
        return True
    return any(path.stat().st_nlink > 1 for path in folder.glob("*/*.onnx"))


def _is_building(folder: Path) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
