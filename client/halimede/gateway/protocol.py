"""HTTP/1.1 with bounds on what a client sends before its request is complete."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
"""Largest head of a request, the URL and all headers."""
HEADER_TIMEOUT_S = 30.0
"""Seconds in which the first head of a connection must have arrived."""


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; it alone has no bounds on a head."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._late = self.loop.call_later(HEADER_TIMEOUT_S, self._end_if_late)

    def data_received(self, data: bytes) -> None:
        """Read what came, unless the head becomes too large."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Begin to count the head's bytes."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request over."""
        self._in_head = False
        self._late.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._late.cancel()
        super().connection_lost(exc)

    def _end_if_late(self) -> None:
        if self.transport is not None:
            self.transport.close()
