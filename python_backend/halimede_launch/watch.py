"""A command that ends when one of its own processes has died: `python watch.py COMMAND…`.

Triton goes on when a process of its Python backend was killed, as the kernel does when memory runs
out: it says that it is ready, fails what it is asked, and never answers what was under way. Here
it is killed instead, for whoever started it to start it again. A container runs nothing else in
Python, so this imports the standard library alone (10 MB).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EVERY_S = 0.5
PROC = Path("/proc")
TOLD = "a process of Triton's Python backend died; Triton is ended with it"


class Watch:
    """Looks after the child processes of one process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._dead: set[int] = set()

    def has_lost_one(self) -> bool:
        """Whether a child has died and its parent has not noticed since the last look: a model
        that is unloaded ends its processes too, and notices at once.
        """
        before, self._dead = self._dead, {pid for pid in self._children() if _state(pid) == "Z"}
        return bool(before & self._dead)

    def _children(self) -> set[int]:
        lists = PROC.glob(f"{self._pid}/task/*/children")
        return {int(pid) for path in lists for pid in _read(path).split()}


def _state(pid: int) -> str:
    """A process's state as proc(5) has it, behind its name in brackets; empty: it is gone."""
    return _read(PROC / str(pid) / "stat").rpartition(") ")[2][:1]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def run(command: Sequence[str]) -> int:
    """Exit status of the command; it is killed when it has lost a process. SIGTERM and SIGINT are
    passed on to it.
    """
    process = subprocess.Popen(command)
    for passed in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed, lambda number, _: process.send_signal(number))
    watch = Watch(process.pid)
    while True:
        try:
            status = process.wait(EVERY_S)
        except subprocess.TimeoutExpired:
            if watch.has_lost_one():
                print(TOLD, file=sys.stderr, flush=True)
                process.kill()
        else:
            return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
