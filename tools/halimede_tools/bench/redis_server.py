"""A redis-server for tests and benchmarks: on a free port, in a given folder, ended afterwards."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from halimede_ops.errors import ServeError
from halimede_tools.serve.ports import free_ports

READY_S = 10.0


@contextlib.contextmanager
def serve(folder: Path, *options: str, port: int | None = None) -> Iterator[str]:
    """Start a redis-server, with `options` as on its command line; its url.

    Raises:
        ServeError: redis-server is not installed, or does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise ServeError("redis-server is not installed. On Debian: apt-get install redis-server")
    port = port or free_ports(1)[0]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen, port: int) -> None:
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise ServeError(f"redis-server does not answer on port {port}. Is the port taken?")
