"""Settings of the client, resolved once: argument or flag > environment > default."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is also an environment variable: `HALIMEDE_URL`, `HALIMEDE_MODEL`, …"""

    model_config = SettingsConfigDict(env_prefix="HALIMEDE_")

    url: str = "127.0.0.1:8001"
    """Server: `host:port` or `grpc://host:port` for gRPC, `http://host:port` for HTTP."""
    model: str = "all-MiniLM-L6-v2"
    timeout_s: float = 30.0
    """Longest wait for one request."""
    repository: Path = Path("model_repository")
    """Model repository of the server, where it is on this machine: its quality records are read."""
