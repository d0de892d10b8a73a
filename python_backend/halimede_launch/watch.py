"""Runs a command and ends it when one of its child processes dies:
`python -m halimede_launch.watch COMMAND…`.

When a process of its Python backend is killed, for example by the kernel for lack of memory, Triton
runs on: it reports that it is ready, fails new requests, and never answers those in progress. This
module kills Triton instead, so that whatever started it starts it again. A container runs nothing
else in Python: with the standard library alone this takes 13 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from halimede_launch import connections

POLL_INTERVAL_S = 0.5
PROC = Path("/proc")
STOP_POLL_INTERVAL_S = 0.1
ORPHANS_TIMEOUT_S = 5.0
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that stop a server: of a service manager, of Ctrl-C, and of a terminal that closes."""
HTTP_PORT = "--http-port="
SET_CHILD_SUBREAPER = 36
"""Option of prctl(2): processes whose parents have ended become children of this process."""
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
        before, self._dead = self._dead, {pid for pid in _children(self._pid) if _state(pid) == "Z"}
        return bool(before & self._dead)


def _children(pid: int) -> set[int]:
    lists = PROC.glob(f"{pid}/task/*/children")
    return {int(child) for path in lists for child in _read(path).split()}


def _state(pid: int) -> str:
    """The state of a process: the field after its name in proc(5). Empty: the process is gone."""
    return _read(PROC / str(pid) / "stat").rpartition(") ")[2][:1]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process ended meanwhile
        return ""


def run(command: Sequence[str]) -> int:
    """Run Triton's command and return its exit status; kill it when it loses a child process.

    SIGTERM, SIGINT and SIGHUP stop it: requests under way are answered, idle HTTP connections are
    closed. No process of it is left when this returns.
    """
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    running = _Running()
    running.process = process = subprocess.Popen(command)
    if running.is_stopped:  # before there was a process
        process.terminate()
    [http_port, *_] = [*_values(command, HTTP_PORT), 8000]
    watch = ChildWatch(process.pid)
    while True:
        try:
            status = process.wait(STOP_POLL_INTERVAL_S if running.is_stopped else POLL_INTERVAL_S)
        except subprocess.TimeoutExpired:
            if running.is_stopped:
                connections.close_idle(process.pid, http_port)
            elif watch.has_lost_child():
                print(CHILD_DIED, file=sys.stderr, flush=True)
                process.kill()
        else:
            _kill_orphans()
            return status if status >= 0 else 128 - status


class _Running:
    """The process that runs; a signal stops it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.is_stopped = False
        on_stop(self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.is_stopped = True
        if self.process is not None:
            self.process.terminate()


def on_stop(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Call the handler on each signal that stops a server; return the handlers before.

    A shell ignores SIGINT for what it starts in the background; it is handled all the same. SIGHUP
    stays ignored under `nohup`.
    """
    return {
        number: signal.signal(number, handler)
        for number in STOPPING
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }


def _kill_orphans() -> None:
    """Kill the command's children, which are this process' own now."""
    deadline = time.monotonic() + ORPHANS_TIMEOUT_S
    while (orphans := _children(os.getpid())) and time.monotonic() < deadline:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _values(command: Sequence[str], flag: str) -> list[int]:
    return [int(argument.removeprefix(flag)) for argument in command if argument.startswith(flag)]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
