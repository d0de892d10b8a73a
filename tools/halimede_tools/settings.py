"""Where the tools read and write, resolved once: flag > environment (`HALIMEDE_…`) > default."""

from __future__ import annotations

import os
from pathlib import Path

import halimede_ops
from halimede.config.environment import CHECKOUT, GIB
from halimede.config.environment import Settings as ClientSettings

PACKAGES = Path(halimede_ops.__file__).parents[1]
"""The folder that our packages lie in: python_backend/ of a checkout, or site-packages."""
WHEEL_BACKENDS = PACKAGES / "halimede_backends"
"""The backends, in an installed wheel."""

ROOT = CHECKOUT or Path()
"""Folder that reports are written under."""


class Settings(ClientSettings):
    """The client's settings, and what the tools need besides."""

    python_backend: Path = WHEEL_BACKENDS if WHEEL_BACKENDS.exists() else PACKAGES
    """The backends that run inside Triton."""
    backends: Path | None = None
    """A backend directory laid out beforehand, as a container image has it; None: at each start."""
    memory_limit_gib: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    """Memory that building one model may take; the machine's own by default."""

    @property
    def memory_limit_bytes(self) -> int:
        """`memory_limit_gib` in bytes."""
        return int(self.memory_limit_gib * GIB)

    def run(self, grpc_port: int) -> Path:
        """Folder of a running server: its backends and its log."""
        folder = self.home / "run" / str(grpc_port)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
