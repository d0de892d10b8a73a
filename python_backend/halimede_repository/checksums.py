"""Checksums of the files in a version folder.

A changed byte in the weights gives vectors that look right and are wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from halimede_ops.errors import InvalidModel

FILE_NAME = "sha256sums"
"""In the format of `sha256sum --check`."""


def sha256sums(paths: Iterable[Path]) -> str:
    """The checksums of files in one folder, one line for each, as `sha256sum` prints them."""
    return "".join(f"{sha256(path)}  {path.name}\n" for path in paths)


def check(folder: Path) -> None:
    """Compare the files of a folder with its checksums. A folder without checksums passes.

    Raises:
        InvalidModel: a file is missing or differs from its checksum.
    """
    try:
        listed = (folder / FILE_NAME).read_text("utf-8")
    except OSError:  # built by hand, or before version folders had checksums
        return
    for line in listed.splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise InvalidModel(f"{name} is not what was built; build the model again")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
