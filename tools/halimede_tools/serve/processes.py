"""Child processes that end with this process, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Program that asks the kernel to end it when its parent ends, then runs the command that it is
given. A preexec_fn would run Python between fork and exec, where gRPC's threads can crash it."""
KILL_GROUP = """
import contextlib, ctypes, glob, os, signal, sys, time
parent, group, limit_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
PR_SET_PDEATHSIG = 1
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == parent:
    signal.sigwait({signal.SIGTERM})
def state():
    try:
        with open(f"/proc/{group}/stat", errors="replace") as file:
            return file.read().rpartition(") ")[2][:1]
    except OSError:
        return ""
deadline = time.monotonic() + limit_s
while state() not in ("", "Z") and time.monotonic() < deadline:
    time.sleep(0.1)
with contextlib.suppress(ProcessLookupError):
    os.killpg(group, signal.SIGKILL)
for path in glob.glob(glob.escape(sys.argv[4]) + "*"):
    with contextlib.suppress(OSError):
        os.unlink(path)
"""
"""Program that waits until its parent ends, then until the leader of a process group ends or a
time limit, kills the group and removes the files whose paths begin so."""


def ending_with_this_process(command: Sequence[str]) -> list[str]:
    """The command, run so that it gets SIGTERM when this process ends."""
    return [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *command]


def kill_group_after_this_process(
    group: int, limit_s: float, files: str
) -> subprocess.Popen[bytes]:
    """Start a process that kills a process group when this process has ended without doing so, and
    the group's leader has ended or had `limit_s` to do so. Then it removes the files whose paths
    begin with `files`. Kill it when the group has ended.

    Triton's Python backends do not notice that Triton ends while they start.
    """
    arguments = [str(os.getpid()), str(group), str(limit_s), files]
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", KILL_GROUP, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
