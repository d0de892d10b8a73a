"""Settings of the client from the environment; arguments and flags go before them."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 2**30


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
    repository: Path = Path("model_repository")
    """Model repository, where it is on this machine: what it records is read, and the provider
    onnx runs it."""
    home: Path = Path(".halimede")
    """Folder of the model store, where it is on this machine."""
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
