"""Build steps that run once: a finished step leaves a folder whose files are checksummed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from halimede.config.folders import HOME, writing
from halimede.models.store import LOCK, PART, RECORD, damaged, recorded
from halimede_ops.errors import BuildError
from halimede_repository.checksums import sha256
from halimede_tools.build.keys import code, key_of
from halimede_tools.console import console
from halimede_tools.settings import Settings


def run_step(folder: Path, title: str, step: functools.partial[None]) -> Path:
    """`folder`, filled by `step(folder)`; kept while the step's key is the same.

    Raises:
        BuildError: the disk is full; what was there before is kept.
    """
    return cached_step(folder, step_key(step), title, step)


def step_key(step: functools.partial[None]) -> str:
    """The key of a step: a function with all its arguments but the folder to fill.

    It covers the code of the function's module and of what that uses, the versions of tools, and
    the arguments: of files and folders the content, not the path.
    """
    arguments = json.dumps([step.args, step.keywords], default=_content, sort_keys=True)
    return key_of(step.func.__qualname__, code(step.func.__module__), arguments)


def cached_step(folder: Path, key: str, title: str, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fill`; kept while it was filled for the same `key` and is intact.

    `fill` gets a folder beside it that is renamed when complete, so a killed build leaves either
    the whole step or nothing. `key` covers all that the result depends on.

    Raises:
        BuildError: the disk is full; what was there before is kept.
    """
    if recorded_key(folder) == key and not damaged(folder):
        console.print(f"  [green]✓[/] {title} [dim]kept[/]")
        return folder
    console.print(f"  [cyan]•[/] {title} …")
    began = time.monotonic()
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        fill(part)
        files = {str(path.relative_to(part)): sha256(path) for path in _files(part)}
        (part / RECORD).write_text(json.dumps({"key": key, "files": files}, indent=2))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BuildError(
            f"the disk is full: {title} was given up and what was there is kept. "
            "Free some space, or prune the store, and run the same command again."
        ) from error
    finally:
        if not (part / RECORD).exists():
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    console.print(f"  [green]✓[/] {title} [dim]{time.monotonic() - began:.1f} s[/]")
    return folder


@contextlib.contextmanager
def exclusive(name: str, settings: Settings) -> Iterator[Path]:
    """The folder of a model in the store, locked: nothing else builds or deploys the model.

    Raises:
        BuildError: another build or deploy of the model runs, or the store cannot be written.
    """
    folder = settings.models / name
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        with writing(folder, HOME, BuildError):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise BuildError(
            f"another build or deploy of {name} is running; wait for it, then run the same "
            "command again"
        ) from None
    try:
        yield folder
    finally:
        lock.release()


def recorded_key(folder: Path) -> str | None:
    """The key that a finished step was filled for; None where there is no finished step."""
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


def _content(argument: object) -> object:
    """What JSON can say of a step's argument; a path's content stands for it."""
    if isinstance(argument, Path):
        return fingerprint(argument) if argument.is_dir() else sha256(argument)
    if isinstance(argument, bytes):
        return hashlib.sha256(argument).hexdigest()
    if dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        return dataclasses.asdict(argument)
    raise TypeError(f"a step takes no {type(argument).__name__}: its content has no key")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
