"""Closed-loop load over HTTP/1.1, that leaves the cores to the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from halimede_tools.bench.closed_loop import Load


class StatusError(Exception):
    """A request was answered with another status than 200."""


class _Caller(asyncio.Protocol):
    """A connection that sends its next request when it has an answer."""

    def __init__(self, requests: Iterator[bytes], load: Load, ended: asyncio.Future[None]) -> None:
        self._requests = requests
        self._load = load
        self._ended = ended
        self._received = bytearray()
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        headers = bytes(self._received[:head]).lower()
        length = int(headers.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self._received) < head + 4 + length:
            return
        status = headers.split(b" ", 2)[1]
        self._received.clear()
        self._load.requests += 1
        if status == b"200":
            self._load.answered(None, None, time.perf_counter() - self._began)
        else:
            self._load.failed(None, StatusError(status.decode()))
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._load.failed(None, exc or ConnectionError("the server closed the connection"))
            self._ended.set_result(None)

    def _send(self) -> None:
        request = next(self._requests, None)
        if request is None:
            if not self._ended.done():
                self._ended.set_result(None)
            self._transport.close()
            return
        self._began = time.perf_counter()
        self._transport.write(request)


def post(url: str, bodies: Sequence[bytes], callers: int) -> Load:
    """Post each JSON body in a request of its own.

    Raises:
        Exception: a request failed.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json"
    requests = [f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    load = Load()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        waiting = iter(requests)
        ends = [loop.create_future() for _ in range(callers)]
        began = time.perf_counter()
        for ended in ends:
            await loop.create_connection(
                lambda ended=ended: _Caller(waiting, load, ended),  # type: ignore[misc]
                host,
                port,
            )
        await asyncio.gather(*ends)
        load.seconds = time.perf_counter() - began

    asyncio.run(run())
    load.raise_errors()
    return load
