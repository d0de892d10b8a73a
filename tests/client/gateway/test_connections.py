"""Many connections at once, some of them slow."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import MODEL
from gateways import command, triton_model

from halimede_tools.serve import wheel

CONNECTIONS, SLOW = 1000, 100
ASKED = 300


@pytest.fixture
def many_files() -> Iterator[None]:
    """Each connection is a file of this process and one of the gateway's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_connections_harm_nobody(server: wheel.Server, tmp_path: Path) -> None:
    """While 900 connections are idle and 100 send a body byte by byte, every other request is
    answered; the slow ones are told that they were too slow.
    """
    with command(tmp_path, triton_model(server), body_timeout=8) as (address, process):
        before = psutil.Process(process.pid).memory_info().rss
        answers, slow = asyncio.run(beside_slow_ones(address))
        grown = psutil.Process(process.pid).memory_info().rss - before
    assert answers == [200] * ASKED
    assert all(b" 408 " in head for head in slow)
    assert grown < 64 * 2**20, f"{grown:,} bytes"


async def beside_slow_ones(address: str) -> tuple[list[int], list[bytes]]:
    """Statuses of requests beside all these connections, and what the slow ones were told."""
    url = httpx.URL(address)
    opened = [await asyncio.open_connection(url.host, url.port) for _ in range(CONNECTIONS)]
    dripping = [asyncio.create_task(drip(*pair)) for pair in opened[:SLOW]]
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        body = {"model": MODEL, "input": "hello"}
        answers = []
        for _ in range(ASKED // 20):
            posts = [client.post("/v1/embeddings", json=body) for _ in range(20)]
            answers += [answer.status_code for answer in await asyncio.gather(*posts)]
    slow = await asyncio.gather(*dripping)
    for _, writer in opened:
        writer.close()
    return answers, slow


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Send a body a byte at a time until the gateway answers, and return the answer's head."""
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 100000\r\n\r\n".encode())
    reading = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    while not reading.done():
        writer.write(b" ")
        await asyncio.wait([reading], timeout=0.2)
    return await reading
