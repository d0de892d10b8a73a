"""Settings of the client from the environment; arguments and flags go before them."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 2**30
SOURCES = Path(__file__).resolve().parents[3]
CHECKOUT = SOURCES if (SOURCES / "pyproject.toml").exists() else None
"""The checkout that this code runs from; None where the package is installed."""


def _data(name: str, in_checkout: str) -> Path:
    """A folder of the checkout, or of the user's data directory."""
    if CHECKOUT is not None:
        return CHECKOUT / in_checkout
    return platformdirs.user_data_path("halimede") / name


class Settings(BaseSettings):
    """Each field is also an environment variable: `HALIMEDE_URL`, `HALIMEDE_MODEL`, …"""

    model_config = SettingsConfigDict(env_prefix="HALIMEDE_")

    url: str | tuple[str, ...] | None = None
    """Server: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP."""
    model: str | None = None
    """Name of the served model, or of one of the configuration's."""
    timeout_s: float | None = None
    """Longest wait for one request."""
    deadline_s: float | None = None
    """Longest time that one call may take."""
    config: Path | None = None
    """Configuration file."""
    repository: Path = Field(default_factory=lambda: _data("model_repository", "model_repository"))
    """Model repository on this machine: the build writes it, Triton and the provider onnx read it.
    By default in the user's data directory, or in the checkout that the code runs from."""
    home: Path = Field(default_factory=lambda: _data("home", ".halimede"))
    """Folder of downloads, built files, locks and the server's run folder; default as above."""
    store_limit_gib: float = 100.0
    """Size that the model store is pruned to after each build."""

    @property
    def models(self) -> Path:
        """The model store: one folder a model, one folder a build step in it."""
        return self.home / "models"

    @property
    def store_limit_bytes(self) -> int:
        """`store_limit_gib` in bytes."""
        return int(self.store_limit_gib * GIB)
