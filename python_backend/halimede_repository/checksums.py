"""Whether a version folder's files are those that were built: a changed byte of the weights gives
vectors that look right and are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from halimede_ops.errors import InvalidModel

FILE_NAME = "sha256sums"
"""As `sha256sum --check` reads it."""


def of(paths: Iterable[Path]) -> str:
    """The sums of some files of one folder, a line each."""
    return "".join(f"{sha256(path)}  {path.name}\n" for path in paths)


def check(folder: Path) -> None:
    """Nothing when a folder's files are as its sums say, or it has none.

    Raises:
        InvalidModel: a file is missing or another.
    """
    try:
        told = (folder / FILE_NAME).read_text("utf-8")
    except OSError:  # built before there were sums, or by hand
        return
    for line in told.splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise InvalidModel(f"{name} is not what was built; build the model again")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
