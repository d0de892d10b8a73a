"""Runs a command and ends it when one of its child processes dies: `python watch.py COMMAND…`.

When a process of its Python backend is killed, for example by the kernel for lack of memory, Triton
runs on: it reports that it is ready, fails new requests, and never answers those in progress. This
module kills Triton instead, so that whatever started it starts it again. A container runs nothing
else in Python: with the standard library alone this takes 10 MB.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

POLL_INTERVAL_S = 0.5
PROC = Path("/proc")
CHILD_DIED = "a process of Triton's Python backend died; Triton is ended with it"


class ChildWatch:
    """Watches the child processes of one process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._dead: set[int] = set()

    def has_lost_child(self) -> bool:
        """Whether a child is dead now and was dead at the last call.

        A parent that ends a child on purpose, as Triton does when it unloads a model, collects its
        exit status at once: such a child is never seen twice.
        """
        before, self._dead = self._dead, {pid for pid in self._children() if _state(pid) == "Z"}
        return bool(before & self._dead)

    def _children(self) -> set[int]:
        lists = PROC.glob(f"{self._pid}/task/*/children")
        return {int(pid) for path in lists for pid in _read(path).split()}


def _state(pid: int) -> str:
    """The state of a process: the field after its name in proc(5). Empty: the process is gone."""
    return _read(PROC / str(pid) / "stat").rpartition(") ")[2][:1]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process ended meanwhile
        return ""


def run(command: Sequence[str]) -> int:
    """Run a command and return its exit status; kill it when it loses a child process.

    SIGTERM and SIGINT are forwarded to the command.
    """
    process = subprocess.Popen(command)
    for forwarded in (signal.SIGTERM, signal.SIGINT):
        signal.signal(forwarded, lambda number, _: process.send_signal(number))
    watch = ChildWatch(process.pid)
    while True:
        try:
            status = process.wait(POLL_INTERVAL_S)
        except subprocess.TimeoutExpired:
            if watch.has_lost_child():
                print(CHILD_DIED, file=sys.stderr, flush=True)
                process.kill()
        else:
            return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
