"""What a server keeps in /dev/shm: the regions of its Python backend, and links to its folders.

The name of each entry begins with the process id and the gRPC port of its server, so that a later
server can remove what a killed one left.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from halimede_ops.errors import ServeError

FOLDER = Path("/dev/shm")  # noqa: S108 - Triton's Python backend creates its regions there
UNSAFE = re.compile(r"[^\w@%+=,./-]")
"""A character that a shell may interpret, as in `shlex.quote`, or that separates the folders of
LD_LIBRARY_PATH: a colon or a semicolon. Letters of any language are safe."""


def prefix(grpc_port: int) -> str:
    """Beginning of the names that a server has which this process starts."""
    return f"halimede-{os.getpid()}-{grpc_port}-"


def shell_safe(path: Path, name: str, grpc_port: int) -> Path:
    """The path, or a link to it if a shell or the dynamic linker would not read it as one path.

    Triton's Python backend starts its stub with `bash -c`, and does not quote the paths. `name`
    tells the links of one server apart.

    Raises:
        ServeError: the link cannot be made.
    """
    path = path.resolve()
    if is_shell_safe(str(path)):
        return path
    link = FOLDER / f"{prefix(grpc_port)}{name}-{secrets.token_hex(4)}"
    try:
        link.symlink_to(path)
    except OSError as error:
        raise ServeError(
            f"{path} has a character that a shell interprets, and Triton starts its backends "
            f"through a shell. A link to it could not be made in {FOLDER}: {error.strerror}. "
            "Use a path of letters, digits and the characters _ - . /"
        ) from None
    return link


def is_shell_safe(text: str) -> bool:
    """Whether a shell reads the text as one word, unchanged, and the linker as one path."""
    return not UNSAFE.search(text)


def remove(beginning: str) -> None:
    """Remove the entries whose names begin so."""
    for entry in FOLDER.glob(f"{beginning}*"):
        _unlink(entry)


def remove_stale(grpc_port: int) -> None:
    """Remove the entries of killed servers that had this gRPC port, except another user's."""
    for entry in FOLDER.glob(f"halimede-*-{grpc_port}-*"):
        owner_pid = entry.name.split("-")[1]
        if owner_pid == str(os.getpid()) or not Path(f"/proc/{owner_pid}").exists():
            _unlink(entry)


def _unlink(entry: Path) -> None:
    # Another user's entry takes memory, and no name: those of a new server are random.
    with contextlib.suppress(PermissionError):
        entry.unlink(missing_ok=True)
