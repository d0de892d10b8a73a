"""The edge: what holds for every request before and after its endpoint."""

from __future__ import annotations

from typing import Any

from halimede.config.gateway import GatewayConfig
from halimede.gateway.keys import Caller


class Edge:
    """The outermost application."""

    def __init__(self, app: Any, config: GatewayConfig, refuse: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["caller"] = Caller()
        await self.app(scope, receive, send)
