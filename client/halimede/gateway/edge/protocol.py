"""HTTP/1.1 with bounds on what a client sends before its request is complete."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
"""Largest head of a request, the URL and all headers. What surrounds a body has the same bound."""
HEADER_TIMEOUT_S = 30.0
"""Seconds in which a head must have arrived."""
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
NO_UPGRADE = b"\r\nx-grade:"


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; it alone has no bounds on a head."""

    _late: asyncio.TimerHandle | None = None
    _head_bytes = 0
    """Bytes that came since the last byte of a body, or since a head or body was complete."""
    _unsent_bytes: float = float("inf")
    """Bytes of answers that the client had not read when that was last looked at."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Read what came, unless the head is too large."""
        self._head_bytes += len(data)
        super().data_received(_without_upgrade(data) if self._is_idle else data)
        if self._head_bytes > MAX_HEADER_BYTES:
            self._end(431)
        elif self._late is None and self._is_idle:  # the rest of a body that was refused
            self._expect_head()

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of a head."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Hand the request over."""
        self._head_bytes = 0
        self._expect_nothing()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Read a part of a body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to count the bytes of the next head."""
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, or for the client to read the last answer."""
        super().on_response_complete()
        self._unsent_bytes = float("inf")
        if self.transport.is_closing():
            self._expect_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._expect_nothing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that is not used, also if its client does not read the last answer."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            super().timeout_keep_alive_handler()
        elif unsent < self._unsent_bytes:
            self._unsent_bytes = unsent
            self._expect_reading()
        else:
            self.transport.abort()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADER_TIMEOUT_S, self._end, 408)

    def _expect_reading(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _expect_nothing(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self, status: int) -> None:
        """Close the connection; say why, unless an answer is under way."""
        self._expect_nothing()
        if self.transport is None or self.transport.is_closing():
            return
        if self._is_idle:
            self.transport.write(
                STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n"
            )
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """Return a head, and what follows it, with another name for the header Upgrade.

    Java's client and others offer HTTP/2 with each request. The parser then leaves the body to
    the other protocol, which nobody here speaks.
    """
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    if not UPGRADE.search(head):
        return data
    return UPGRADE.sub(NO_UPGRADE, head) + data[len(head) :]
