"""Memory of a Triton that runs on this machine, and how much it may use.

Triton's own metrics have the memory of the whole machine only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
TRITON = "tritonserver"
LISTENING = "0A"


def share(host: str, port: int) -> float | None:
    """Share of its memory that the server at this address uses: 0 to 1.

    The server's memory is that of Triton and its child processes; what they share counts once.
    Its limit is that of its cgroup, otherwise the machine's memory. None: the server does not run
    on this machine as a process that this one may read, as in a container or of another user.
    """
    with contextlib.suppress(OSError, ValueError):
        if _is_this_machine(host) and (pid := _listener(port)) is not None:
            return used_bytes(pid) / limit_bytes(pid)
    return None


def used_bytes(pid: int) -> int:
    """Memory of a process and its descendants; what processes share counts once."""
    return sum(_own_bytes(member) for member in _family(pid))


def limit_bytes(pid: int, proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The smallest memory limit of a process' cgroups, at most the machine's memory."""
    limits = [_field_bytes(proc / "meminfo", "MemTotal")]
    for line in (proc / str(pid) / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = PurePosixPath(path.lstrip("/"))
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                limits.append(int((root / level / name).read_text()))
    return min(limits)


def _is_this_machine(host: str) -> bool:
    """Whether a host is an address of this machine: a socket can be bound to it."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        if ipaddress.ip_address(address[0]).is_unspecified:
            return True
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _listener(port: int) -> int | None:
    """The Triton of this machine that listens on a port."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for name in PROC.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if name.read_text().strip() == TRITON:
                files = (name.parent / "fd").iterdir()
                if any(os.readlink(file) in sockets for file in files):  # noqa: PTH115
                    return int(name.parent.name)
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # no IPv6
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # the thread ended
            for child in children.read_text().split():
                yield from _family(int(child))


def _own_bytes(pid: int) -> int:
    """The proportional set size; where it cannot be read, the resident set size. 0: it ended."""
    for file, field in (("smaps_rollup", "Pss"), ("status", "VmRSS")):
        with contextlib.suppress(OSError, ValueError):
            return _field_bytes(PROC / str(pid) / file, field)
    return 0


def _field_bytes(path: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no {field}")
    return 1024 * int(found[1])
