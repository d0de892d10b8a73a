"""Keys of remote providers: a configuration names where a key is, and never holds it."""

from __future__ import annotations

import os
from pathlib import Path

from halimede.providers.base import Options
from halimede_ops.errors import AccessDenied, InvalidConfig

NO_KEY = "none"
"""Sent to a server of one's own that needs no key: an SDK would look for another one."""


class ApiOptions(Options):
    """Options of a model behind an API that takes a key."""

    url: str | None = None
    """Base URL of another server with the same API. None is the provider's own."""
    api_key_env: str | None = None
    """Environment variable that holds the key."""
    api_key_file: Path | None = None
    """File that holds the key."""

    def key(self, default_env: str) -> str:
        """Return the key to send. NO_KEY if there is none and a `url` is given.

        Raises:
            InvalidConfig: the configured file or variable does not exist.
            AccessDenied: there is no key, and the provider's own API needs one.
        """
        key = self.secret(default_env)
        if key is None and self.url is None:
            raise AccessDenied(
                f"{self.provider} wants a key: set {default_env}, or name another variable as "
                "api_key_env."
            )
        return key or NO_KEY

    def secret(self, default_env: str) -> str | None:
        """Read the key from the file, or from the environment. None if there is none.

        Raises:
            InvalidConfig: the configured file or variable does not exist.
        """
        if self.api_key_file is not None:
            try:
                return self.api_key_file.read_text().strip()
            except OSError as error:
                raise InvalidConfig(f"api_key_file cannot be read: {error.strerror}.") from None
        key = os.environ.get(self.api_key_env or default_env)
        if key is None and self.api_key_env:
            raise InvalidConfig(f"the environment has no {self.api_key_env} (api_key_env).")
        return key
