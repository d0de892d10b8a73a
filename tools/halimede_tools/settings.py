"""Folders and limits of the tools: a flag, else the environment (`HALIMEDE_…`), else a default."""

from __future__ import annotations

import os
from pathlib import Path

import halimede_ops
from halimede.config.environment import GIB
from halimede.config.environment import Settings as ClientSettings
from halimede.config.folders import HOME, writing
from halimede_ops.errors import ServeError

PACKAGES = Path(halimede_ops.__file__).parents[1]
"""Folder of our packages: python_backend/ of a checkout, or site-packages."""
WHEEL_BACKENDS = PACKAGES / "halimede_backends"
"""Folder of the backends in an installed wheel."""


class Settings(ClientSettings):
    """The client's settings, and those of the tools."""

    python_backend: Path = WHEEL_BACKENDS if WHEEL_BACKENDS.exists() else PACKAGES
    """Folder of the backends that run inside Triton."""
    backends: Path | None = None
    """Prepared backend directory, as in a container image. None: prepare one at each start."""
    memory_limit_gib: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    """Memory limit of building one model; by default the machine's memory."""

    @property
    def memory_limit_bytes(self) -> int:
        """`memory_limit_gib` in bytes."""
        return int(self.memory_limit_gib * GIB)

    def run(self, grpc_port: int) -> Path:
        """Folder for the backends and the log of a running server.

        Raises:
            ServeError: it cannot be made.
        """
        folder = self.home / "run" / str(grpc_port)
        with writing(folder, HOME, ServeError):
            folder.mkdir(parents=True, exist_ok=True)
        return folder
