"""Where the tools read and write, resolved once: flag > environment (`HALIMEDE_…`) > default."""

from __future__ import annotations

import os
from pathlib import Path

from halimede.config.environment import GIB
from halimede.config.environment import Settings as ClientSettings

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


class Settings(ClientSettings):
    """The client's settings with the checkout's folders, and what the tools need beside them."""

    home: Path = ROOT / ".halimede"
    """Downloads, exported and quantised files, locks, and the server's run folder."""
    repository: Path = ROOT / "model_repository"
    """The Triton model repository that is built and served."""
    python_backend: Path = ROOT / "python_backend"
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
