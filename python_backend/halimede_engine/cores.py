"""The cores that this process may use: its CPU affinity, or the CPU quota of its cgroup if less.

A container with `--cpus 2` sees every core of its machine, and has the CPU time of two. With a
thread for each core of the machine, all of them would run for a fraction of each period of the
quota, and all of them would then wait for the next period.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
V1_CONTROLLER = "cpu"
"""In /proc/self/cgroup and among a mount's options, alone or in `cpu,cpuacct`."""
V2_QUOTA = "cpu.max"
V1_QUOTA = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
OPENMP = "OMP_NUM_THREADS"
"""Environment variable that PyTorch, MKL and OpenBLAS read, each when it is loaded."""


class Cores(NamedTuple):
    """The cores that a process may use, and what limits them."""

    machine: int
    """Cores of the machine."""
    affinity: int
    """Cores of the process's CPU affinity: taskset, `docker --cpuset-cpus`."""
    quota: float | None
    """CPU quota of the cgroup, in cores: `docker --cpus`, a Kubernetes limit, systemd's CPUQuota.
    None: there is none."""

    @property
    def available(self) -> int:
        """The smaller of affinity and quota, at least 1.

        A quota of 1.5 counts as 2, as in the JVM and in Go (1.25). Go's least is 2, the JVM's 1.
        Here it is 1: a second thread of the engine would only compete for the CPU of the first.
        """
        if self.quota is None:
            return self.affinity
        return max(1, min(self.affinity, math.ceil(self.quota)))

    @property
    def is_limited_by_quota(self) -> bool:
        """Whether the quota allows fewer cores than the affinity."""
        return self.available < self.affinity

    def __str__(self) -> str:
        """Such as `2 cores (CPU quota of the cgroup; the machine has 64)`."""
        if self.is_limited_by_quota:
            exact = "" if self.quota == self.available else f", {self.quota:.4g}"
            reason = f" (CPU quota of the cgroup{exact}; the machine has {self.machine})"
        elif self.available < self.machine:
            reason = f" (CPU affinity; the machine has {self.machine})"
        else:
            reason = ""
        return f"{self.available} core{'' if self.available == 1 else 's'}{reason}"


def read() -> Cores:
    """The cores that this process may use now. Reading them takes a fraction of a millisecond."""
    affinity = len(os.sched_getaffinity(0))
    return Cores(os.cpu_count() or affinity, affinity, quota())


def available() -> int:
    """The number of cores that this process may use now, at least 1: see `Cores.available`."""
    return read().available


def library_threads(cores: Cores) -> Mapping[str, str]:
    """Environment variables for libraries that count the cores and do not read the quota.

    Empty if the affinity is the limit: they count that themselves. The tokenizers read the quota,
    and onnxruntime and OpenVINO are given their threads.
    """
    return {OPENMP: str(cores.available)} if cores.is_limited_by_quota else {}


def quota(root: Path = ROOT) -> float | None:
    """The lowest CPU quota of this process's cgroup and those above it, in cores; None: no quota.

    The files are those of cgroups(7), version 2 and version 1. A file that is missing, or that has
    no quota in it, sets no quota.

    Args:
        root: root of the file system, for tests.
    """
    paths = _paths(_read(root / "proc/self/cgroup"))
    quotas = (
        _quota(folder)
        for mount in mounts(root)
        for folder in _folders(root / mount.point.lstrip("/"), _below(mount, paths))
    )
    return min((value for value in quotas if value is not None), default=None)


class Mount(NamedTuple):
    """A mounted hierarchy of cgroups that may set a CPU quota."""

    controller: str
    """`cpu` for version 1, empty for version 2, as in /proc/self/cgroup."""
    cgroup: str
    """The cgroup that is mounted: `/`, or in a container often its own."""
    point: str
    """Where it is mounted."""


def _paths(cgroup: str) -> dict[str, str]:
    """Controller → path of this process's cgroup, from /proc/self/cgroup."""
    fields = (line.split(":", 2) for line in cgroup.splitlines())
    return {
        controller: path
        for _, controllers, path in (line for line in fields if len(line) == 3)
        for controller in controllers.split(",")
    }


def mounts(root: Path = ROOT) -> Iterator[Mount]:
    """The mounted hierarchies that may set a CPU quota, from /proc/self/mountinfo: see proc(5)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        if len(mount.split()) < 6 or len(kind.split()) < 3:
            continue
        _, _, _, cgroup, point, *_ = map(_unescaped, mount.split())
        kind, _, options = kind.split()[:3]
        if kind == "cgroup2":
            yield Mount("", cgroup, point)
        elif kind == "cgroup" and V1_CONTROLLER in options.split(","):
            yield Mount(V1_CONTROLLER, cgroup, point)


def _unescaped(field: str) -> str:
    r"""A field of mountinfo. A space in it is written as `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _below(mount: Mount, paths: Mapping[str, str]) -> list[str]:
    """The names from the mount's root to the cgroup of this process.

    Empty if that is the root itself, or if the cgroup is not in what is mounted. A container may
    have a path of the machine in /proc/self/cgroup, with its own cgroup mounted as the root.
    """
    path = [name for name in paths.get(mount.controller, "/").split("/") if name]
    root = [name for name in mount.cgroup.split("/") if name]
    if ".." in path or path[: len(root)] != root:
        return []
    return path[len(root) :]


def _folders(root: Path, below: list[str]) -> Iterator[Path]:
    """The folder of a cgroup and those above it up to `root`: any of them may be the tightest."""
    for depth in range(len(below), -1, -1):
        yield root.joinpath(*below[:depth])


def _quota(folder: Path) -> float | None:
    """The CPU quota that a cgroup sets itself, in cores, by either version's files."""
    version_1 = " ".join(_read(folder / name) for name in V1_QUOTA)
    for text in (_read(folder / V2_QUOTA), version_1):
        try:
            allowed_us, period_us = map(int, text.split())
        except ValueError:  # `max`, no such file, or not what the kernel writes
            continue
        if allowed_us > 0 and period_us > 0:
            return allowed_us / period_us
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):  # ValueError: the path has a null character
        return ""
