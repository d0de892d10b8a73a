"""API keys: who may ask which models, how much, and how often."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Caller:
    """Who asks."""

    key_id: str = ""
    """Name of the key. Empty: the gateway has no keys."""
    space: str | None = None
    """The only space whose answers are wanted."""

    def check_model(self, name: str) -> None:
        """Raise unless the key is for this model."""

    async def check_tokens(self) -> None:
        """Raise unless tokens are left of the key's rate and quota."""

    async def charge(self, tokens: int) -> None:
        """Count tokens that were answered."""
