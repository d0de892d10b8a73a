"""Where the tools read and write, resolved once: flag > environment (`HALIMEDE_…`) > default."""

from __future__ import annotations

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
