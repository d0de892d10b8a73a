"""Settings of the client from the environment; arguments and flags take precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import platformdirs
from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from halimede_ops.errors import InvalidConfig

GIB = 2**30
SOURCES = Path(__file__).resolve().parents[3]
CHECKOUT = SOURCES if (SOURCES / "pyproject.toml").exists() else None
"""The checkout that this code runs from; None where the package is installed."""


def _data(name: str, in_checkout: str) -> Path:
    """A folder of the checkout, or of the user's data directory."""
    if CHECKOUT is not None:
        return CHECKOUT / in_checkout
    try:
        return platformdirs.user_data_path("halimede") / name
    except RuntimeError:  # a user without HOME and without an entry in passwd
        return Path.cwd() / ".halimede" / name


class Settings(BaseSettings):
    """Each field is also an environment variable: `HALIMEDE_URL`, `HALIMEDE_MODEL`, …"""

    model_config = SettingsConfigDict(env_prefix="HALIMEDE_")

    def __init__(self, **given: Any) -> None:
        """Read the environment; what is given takes precedence.

        Raises:
            InvalidConfig: a variable, or a value given, is invalid.
        """
        try:
            super().__init__(**given)
        except ValidationError as error:
            problems = {str(problem["loc"][0]): problem["msg"] for problem in error.errors()}
        except SettingsError:
            raise InvalidConfig("a HALIMEDE_ variable is no valid value.") from None
        else:
            return
        raise InvalidConfig(
            "; ".join(
                f"{name if name in given else f'HALIMEDE_{name.upper()}'}: {reason}."
                for name, reason in problems.items()
            )
        )

    url: str | tuple[str, ...] | None = None
    """Server of the default model: `host:port` or `grpc://host:port` for gRPC,
    `http://host:port` for HTTP."""
    model: str | None = None
    """Name of a served model, or of a model of the configuration file."""
    timeout_s: PositiveFloat | None = None
    """Longest wait for one request to the default model, in seconds."""
    deadline_s: PositiveFloat | None = None
    """Longest time that one call may take, in seconds."""
    config: Path | None = None
    """Path of the configuration file."""
    repository: Path = Field(default_factory=lambda: _data("model_repository", "model_repository"))
    """Model repository on this machine. The build writes it; Triton and the provider `onnx` serve
    it; `halimede models --verbose` reads what the build recorded. Default: `model_repository` in
    the checkout that the code runs from, otherwise in the user's data directory, otherwise in
    `.halimede` of the current folder."""
    home: Path = Field(default_factory=lambda: _data("home", ".halimede"))
    """Folder of the model store, locks, and the run folders of servers. Default: `.halimede` in
    the checkout that the code runs from, otherwise a folder in the user's data directory."""
    store_limit_gib: NonNegativeFloat = 100.0
    """Size to which the model store is pruned after each build, in GiB."""

    @property
    def models(self) -> Path:
        """The model store: one folder per model, with one folder per build step."""
        return self.home / "models"

    @property
    def store_limit_bytes(self) -> int:
        """`store_limit_gib` in bytes."""
        return int(self.store_limit_gib * GIB)
