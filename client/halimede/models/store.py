"""The model store: downloads and built files, one folder per model, bounded in size.

A model's folder contains one folder per finished build step, with a record of every file's
sha256. A model repository has hard links to the files it serves; these models are never evicted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from halimede.config.folders import HOME, writing
from halimede_ops.errors import InvalidInput
from halimede_repository.checksums import sha256

RECORD = ".done.json"
"""File in each finished step's folder: the step's key, and every file's sha256."""
PART = ".part"
"""Suffix of an unfinished step's folder: its build runs, or was killed."""
LOCK = ".lock"
"""Lock file in a model's folder, locked while the model is built."""
USED = ".used"
"""File in a model's folder whose modification time is that of the last build."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One model in the store."""

    name: str
    size_bytes: int
    last_built_s: float
    """Time of the last build, in seconds since 1970."""
    steps: tuple[str, ...]
    """Finished build steps."""
    served: bool
    """Whether a repository serves its files."""
    building: bool
    """Whether a build of it runs now."""


def stored(models: Path, repository: Path) -> list[Stored]:
    """Return every model of the store, the last built first."""
    folders = (folder for folder in models.glob("*") if (folder / LOCK).exists())
    found = [_stored(folder, repository) for folder in folders]
    return sorted(found, key=lambda model: model.last_built_s, reverse=True)


def verify(models: Path, name: str | None = None) -> dict[str, list[str]]:
    """Read every file and return those missing or changed: model → `step/file`.

    Raises:
        InvalidInput: the store has no model of this name.
    """
    if name is not None and not (models / name / LOCK).exists():
        raise InvalidInput(f"{name!r} is not in the store. `halimede store ls` lists its models.")
    folders = [models / name] if name else sorted(path.parent for path in models.glob(f"*/{LOCK}"))
    damaged_files = {
        folder.name: [f"{step.name}/{file}" for step in _steps(folder) for file in damaged(step)]
        for folder in folders
    }
    return {model: files for model, files in damaged_files.items() if files}


def prune(
    models: Path, repository: Path, limit_bytes: int, keep: str | None = None
) -> list[Stored]:
    """Evict the models built longest ago until the store fits, and return those evicted.

    Models that are served or being built are never evicted, and neither is `keep`.

    Raises:
        HalimedeError: a model cannot be deleted.
    """
    from filelock import FileLock, Timeout

    candidates = stored(models, repository)
    size_bytes = sum(model.size_bytes for model in candidates)
    evicted = []
    for model in reversed(candidates):
        if size_bytes <= limit_bytes:
            break
        if model.served or model.building or model.name == keep:
            continue
        try:
            with writing(models, HOME), FileLock(models / model.name / LOCK, timeout=0):
                shutil.rmtree(models / model.name)
        except Timeout:
            continue
        size_bytes -= model.size_bytes
        evicted.append(model)
    return evicted


def damaged(step: Path) -> list[str]:
    """Return the files of a finished step that are missing or changed."""
    return [
        name
        for name, digest in recorded(step).items()
        if not (step / name).is_file() or sha256(step / name) != digest
    ]


def recorded(step: Path) -> dict[str, str]:
    """Return the files of a finished step with their sha256; none if it is unfinished."""
    try:
        return dict(json.loads((step / RECORD).read_text())["files"])
    except (OSError, ValueError, KeyError):
        return {}


def _stored(folder: Path, repository: Path) -> Stored:
    files = [path for path in folder.rglob("*") if path.is_file()]
    built = folder / USED
    return Stored(
        name=folder.name,
        size_bytes=sum(path.stat().st_size for path in files),
        last_built_s=(built if built.exists() else folder).stat().st_mtime,
        steps=tuple(step.name for step in _steps(folder)),
        served=_is_served(folder, repository),
        building=_is_building(folder),
    )


def _steps(folder: Path) -> Iterator[Path]:
    for record in sorted(folder.glob(f"*/{RECORD}")):
        if not record.parent.name.endswith(PART):
            yield record.parent


def _is_served(folder: Path, repository: Path) -> bool:
    """Whether this repository has its configs, or any repository has links to its files."""
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
    except OSError:  # a folder that this process cannot write
        return False
