"""Build steps that are done once: a finished step leaves a folder whose files are checksummed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

RECORD = ".done.json"

console = Console(stderr=True, highlight=False, soft_wrap=True)


def once(folder: Path, key: str, name: str, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make`; kept as it is when it was made for the same `key` and is intact.

    `make` fills a folder beside it that is renamed when complete, so a killed build leaves
    either the whole step or nothing. `key` names all that the result depends on.
    """
    if _intact(folder, key):
        console.print(f"  [green]✓[/] {name} [dim]kept[/]")
        return folder
    console.print(f"  [cyan]•[/] {name} …")
    began = time.monotonic()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    make(part)
    files = {str(path.relative_to(part)): sha256(path) for path in _files(part)}
    (part / RECORD).write_text(json.dumps({"key": key, "files": files}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    console.print(f"  [green]✓[/] {name} [dim]{time.monotonic() - began:.1f} s[/]")
    return folder


def _intact(folder: Path, key: str) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text())
        return record["key"] == key and all(
            sha256(folder / name) == digest for name, digest in record["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def key_of(*parts: str) -> str:
    """One short key of several strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
