"""Settings of the client from the environment; arguments and flags take precedence."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 2**30


class Settings(BaseSettings):
    """Each field is also an environment variable: `HALIMEDE_URL`, `HALIMEDE_MODEL`, …"""

    model_config = SettingsConfigDict(env_prefix="HALIMEDE_")

    url: str | tuple[str, ...] | None = None
    """Server of the default model: `host:port` or `grpc://host:port` for gRPC,
    `http://host:port` for HTTP."""
    model: str | None = None
    """Name of a served model, or of a model of the configuration file."""
    timeout_s: float | None = None
    """Longest wait for one request to the default model, in seconds."""
    deadline_s: float | None = None
    """Longest time that one call may take, in seconds."""
    config: Path | None = None
    """Path of the configuration file."""
    repository: Path = Path("model_repository")
    """Model repository on this machine. The provider `onnx` runs its models, and `halimede models
    --verbose` reads what the build recorded."""
    home: Path = Path(".halimede")
    """Folder that contains the model store."""
    store_limit_gib: float = 100.0
    """Size to which the model store is pruned after each build, in GiB."""

    @property
    def models(self) -> Path:
        """The model store: one folder per model, with one folder per build step."""
        return self.home / "models"

    @property
    def store_limit_bytes(self) -> int:
        """`store_limit_gib` in bytes."""
        return int(self.store_limit_gib * GIB)
