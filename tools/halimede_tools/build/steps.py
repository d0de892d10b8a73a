"""Build steps that are done once: a finished step leaves a folder whose files are checksummed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from halimede.models.store import LOCK, PART, RECORD, damaged, recorded
from halimede_ops.errors import BuildError
from halimede_repository.checksums import sha256
from halimede_tools import progress
from halimede_tools.settings import Settings

console = progress.console


def once(folder: Path, key: str, name: str, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make`; kept as it is when it was made for the same `key` and is intact.

    `make` fills a folder beside it that is renamed when complete, so a killed build leaves
    either the whole step or nothing. `key` names all that the result depends on.

    Raises:
        BuildError: the disk is full; what was there before is kept.
    """
    if key_of_made(folder) == key and not damaged(folder):
        console.print(f"  [green]✓[/] {name} [dim]kept[/]")
        return folder
    console.print(f"  [cyan]•[/] {name} …")
    began = time.monotonic()
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        make(part)
        files = {str(path.relative_to(part)): sha256(path) for path in _files(part)}
        (part / RECORD).write_text(json.dumps({"key": key, "files": files}, indent=2))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise BuildError(
            f"the disk is full: {name} was given up and what was there is kept. "
            "Free some space, or prune the store, and run the same command again."
        ) from error
    finally:
        if not (part / RECORD).exists():
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    console.print(f"  [green]✓[/] {name} [dim]{time.monotonic() - began:.1f} s[/]")
    return folder


@contextlib.contextmanager
def alone(name: str, settings: Settings) -> Iterator[Path]:
    """The folder of a model in the store, while nothing else builds or deploys the model.

    Raises:
        BuildError: something does.
    """
    folder = settings.models / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield folder
    except Timeout:
        raise BuildError(
            f"another build or deploy of {name} is running; wait for it, then run the same "
            "command again"
        ) from None


def key_of_made(folder: Path) -> str | None:
    """The key that a finished step was made for; None where there is none."""
    try:
        return str(json.loads((folder / RECORD).read_text())["key"])
    except (OSError, ValueError, KeyError):
        return None


def fingerprint(folder: Path) -> str:
    """One key of all files of a folder: from the record of a finished step, else by reading."""
    files = recorded(folder) or {
        str(path.relative_to(folder)): sha256(path) for path in _files(folder)
    }
    return key_of(json.dumps(files, sort_keys=True))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def key_of(*parts: str) -> str:
    """One short key of several strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
