"""Where the tools read and write, resolved once: flag > environment (`HALIMEDE_…`) > default."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""


class Settings(BaseSettings):
    """Folders of the tools."""

    model_config = SettingsConfigDict(env_prefix="HALIMEDE_")

    home: Path = ROOT / ".halimede"
    """Downloads, exported and quantised files, locks, and the server's run folder."""
    repository: Path = ROOT / "model_repository"
    """The Triton model repository that is built and served."""
    python_backend: Path = ROOT / "python_backend"
    """The backends that run inside Triton."""
    memory_limit_gib: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    """Memory that building one model may take; the machine's own by default."""
    store_limit_gib: float = 100.0
    """Size that the model store is pruned to after each build."""

    @property
    def models(self) -> Path:
        """The model store: one folder a model, one folder a build step in it."""
        return self.home / "models"

    @property
    def memory_limit_bytes(self) -> int:
        """`memory_limit_gib` in bytes."""
        return int(self.memory_limit_gib * 2**30)

    @property
    def store_limit_bytes(self) -> int:
        """`store_limit_gib` in bytes."""
        return int(self.store_limit_gib * 2**30)
