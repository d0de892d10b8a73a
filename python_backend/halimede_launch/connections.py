"""Closes a server's idle HTTP connections, so that its end does not wait for them.

Triton waits at its end until every HTTP client has closed its connection, up to its exit timeout of
30 s. A client that keeps its connection for later requests does not close it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

PIDFD_GETFD = 438
"""System call that copies a file descriptor of another process: pidfd_getfd(2)."""
ESTABLISHED = 1
TIMES = struct.Struct("8x 9I I I I")
"""Start of `struct tcp_info` in linux/tcp.h, up to the times since data was last sent and last
received, in ms."""
TCP = (socket.AF_INET, socket.AF_INET6)


def close_idle(pid: int, port: int) -> None:
    """Close the connections to this port of a process whose clients wait for no answer.

    Nothing happens where the kernel does not allow it, as in a container without CAP_SYS_PTRACE.
    """
    with contextlib.suppress(OSError):
        for connection in _connections(pid, port):
            if _is_idle(connection):
                # The process reads the end of the connection, and closes it. An answer that is
                # under way all the same is still sent.
                with contextlib.suppress(OSError):  # the client was first
                    connection.shutdown(socket.SHUT_RD)


def _connections(pid: int, port: int) -> Iterator[socket.socket]:
    """The process' TCP sockets that are bound to the port, each open until the next is taken."""
    process = os.pidfd_open(pid)
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if not str(link.readlink()).startswith("socket:"):
                    continue
                with socket.socket(fileno=_copy(process, int(link.name))) as connection:
                    if connection.family in TCP and connection.getsockname()[1] == port:
                        yield connection
    finally:
        os.close(process)


def _copy(process: int, descriptor: int) -> int:
    copied = int(ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, descriptor, 0))
    if copied < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copied


def _is_idle(connection: socket.socket) -> bool:
    """Whether the last data was sent by the server: it has answered every request."""
    facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TIMES.size)
    *_, last_sent_ms, _, last_received_ms = TIMES.unpack(facts)
    return facts[0] == ESTABLISHED and last_sent_ms <= last_received_ms
