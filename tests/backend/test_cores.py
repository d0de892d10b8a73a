"""The cores of a process: fake trees of cgroups, and a real cgroup where one can be made."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import NAMES, ROOT

from halimede_engine import cores
from halimede_engine.cores import Cores
from halimede_tools.settings import Settings

MakeTree = Callable[..., Path]

V2 = "30 23 0:26 {root} /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate"
V1 = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
DISK = "22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw"
SUB = "/sys/fs/cgroup"
V1_SUB = f"{SUB}/cpu,cpuacct"


def mounted(*lines: str, root: str = "/") -> str:
    return "".join(f"{line.format(root=root)}\n" for line in (DISK, *lines))


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Make a file system of a process: its cgroup, its mounts, and the files of its cgroups."""

    def make(cgroup: str, mountinfo: str, files: Mapping[str, str | bytes]) -> Path:
        proc = {"/proc/self/cgroup": cgroup, "/proc/self/mountinfo": mountinfo}
        for path, content in {**proc, **files}.items():
            file = tmp_path / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


def v1(folder: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota_us}\n",
        f"{folder}/cpu.cfs_period_us": f"{period_us}\n",
    }


# Version 2


def test_docker_with_cpus_2(make_tree: MakeTree) -> None:
    """`docker run --cpus 2`: its own cgroup is the root of what it sees."""
    tree = make_tree("0::/\n", mounted(V2), {f"{SUB}/cpu.max": "200000 100000\n"})
    assert cores.quota(tree) == 2


def test_docker_without_cpus(make_tree: MakeTree) -> None:
    """`max` is no quota."""
    tree = make_tree("0::/\n", mounted(V2), {f"{SUB}/cpu.max": "max 100000\n"})
    assert cores.quota(tree) is None


@pytest.mark.parametrize(("pod", "container", "lowest"), [(4, 1.5, 1.5), (1, 4, 1), (3, None, 3)])
def test_kubernetes_pod_and_container(
    make_tree: MakeTree, pod: float, container: float | None, lowest: float
) -> None:
    """The lower of a pod's limit and of its container's, on a node that shows the whole path."""
    path = "/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-a.scope"
    allowed = "max" if container is None else f"{container * 100_000:.0f}"
    files = {
        f"{SUB}{path}/cpu.max": f"{allowed} 100000\n",
        f"{SUB}{Path(path).parent}/cpu.max": f"{pod * 100_000:.0f} 100000\n",
        f"{SUB}/kubepods.slice/cpu.max": "max 100000\n",
    }
    assert cores.quota(make_tree(f"0::{path}\n", mounted(V2), files)) == lowest


def test_systemd_slice(make_tree: MakeTree) -> None:
    """`CPUQuota=150%` of a slice above the service, which has no quota of its own."""
    files = {
        f"{SUB}/web.slice/cpu.max": "150000 100000\n",
        f"{SUB}/web.slice/halimede.service/cpu.max": "max 100000\n",
        f"{SUB}/system.slice/cpu.max": "10000 100000\n",
    }
    tree = make_tree("0::/web.slice/halimede.service\n", mounted(V2), files)
    assert cores.quota(tree) == 1.5


def test_container_that_shows_the_path_of_the_machine(make_tree: MakeTree) -> None:
    """Without a namespace of its own, its cgroup is mounted as the root, and listed by its path."""
    path = "/docker/8d2a"
    tree = make_tree(f"0::{path}\n", mounted(V2, root=path), {f"{SUB}/cpu.max": "200000 100000\n"})
    assert cores.quota(tree) == 2


def test_cgroup_outside_of_the_namespace(make_tree: MakeTree) -> None:
    """A path above the namespace's root cannot be followed: the root's quota counts."""
    files = {f"{SUB}/cpu.max": "300000 100000\n", "/sys/fs/other/cpu.max": "100000 100000\n"}
    assert cores.quota(make_tree("0::/../other\n", mounted(V2), files)) == 3


def test_mount_point_with_a_space(make_tree: MakeTree) -> None:
    r"""mountinfo has it as `\040`."""
    mount = V2.replace("/sys/fs/cgroup", r"/my\040cgroups")
    tree = make_tree("0::/\n", mounted(mount), {"/my cgroups/cpu.max": "200000 100000\n"})
    assert cores.quota(tree) == 2


# Version 1


def test_version_1_service(make_tree: MakeTree) -> None:
    """The lowest on the way up from the process's own cgroup of the controller `cpu`."""
    files = {
        **v1(V1_SUB, -1),
        **v1(f"{V1_SUB}/web", 250_000, 50_000),
        **v1(f"{V1_SUB}/web/halimede", -1),
        **v1(f"{SUB}/memory/elsewhere", 10_000),
    }
    cgroup = "12:memory:/elsewhere\n4:cpu,cpuacct:/web/halimede\n1:name=systemd:/elsewhere\n"
    assert cores.quota(make_tree(cgroup, mounted(V1_MEMORY, V1), files)) == 5


def test_version_1_container(make_tree: MakeTree) -> None:
    """The path is the machine's and does not exist in the container: the root's quota counts."""
    cgroup = "4:cpu,cpuacct:/docker/8d2a\n"
    files = v1(V1_SUB, 200_000)
    assert cores.quota(make_tree(cgroup, mounted(V1), files)) == 2
    assert cores.quota(make_tree(cgroup, mounted(V1, root="/docker/8d2a"), files)) == 2
    assert cores.quota(make_tree(cgroup, mounted(V1, root="/docker/another"), files)) == 2


def test_hybrid(make_tree: MakeTree) -> None:
    """Version 2 is mounted without controllers, and version 1 has the quota."""
    files = {**v1(f"{V1_SUB}/web", 50_000), f"{SUB}/unified/web/cgroup.procs": "1\n"}
    tree = make_tree("4:cpu,cpuacct:/web\n0::/web\n", mounted(V1, UNIFIED), files)
    assert cores.quota(tree) == 0.5


# Neither


@pytest.mark.parametrize(
    "content",
    ["", "\n", "200000", "200000 0", "0 100000", "-1 100000", "a b", "nan 1", "1 2 3", b"\xff\x00"],
    ids=repr,
)
def test_unreadable_quota_is_none(make_tree: MakeTree, content: str | bytes) -> None:
    """What the kernel does not write sets no quota."""
    assert cores.quota(make_tree("0::/\n", mounted(V2), {f"{SUB}/cpu.max": content})) is None


@pytest.mark.parametrize("lines", ["", "\n\n", "- \n", "1 2 3 - cgroup2\n", "\0 - \0\n", "0::\n"])
def test_unreadable_proc_is_no_quota(make_tree: MakeTree, lines: str) -> None:
    """Neither file is understood."""
    assert cores.quota(make_tree(lines, lines, {f"{SUB}/cpu.max": "100000 100000\n"})) is None


def test_no_proc_is_no_quota(tmp_path: Path) -> None:
    """Neither file is there, or they are folders."""
    assert cores.quota(tmp_path) is None
    (tmp_path / "proc/self/mountinfo").mkdir(parents=True)
    assert cores.quota(tmp_path) is None


# Rounding and words


@pytest.mark.parametrize(
    ("affinity", "quota", "available"),
    [(64, None, 64), (64, 2, 2), (64, 1.5, 2), (64, 0.1, 1), (2, 8, 2), (64, 2.001, 3), (1, 1, 1)],
)
def test_quota_is_rounded_up(affinity: int, quota: float | None, available: int) -> None:
    """As the JVM and Go do, but never to 0 and never above the affinity."""
    assert Cores(64, affinity, quota).available == available


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (Cores(64, 64, None), "64 cores"),
        (Cores(64, 64, 2), "2 cores (CPU quota of the cgroup; the machine has 64)"),
        (Cores(64, 64, 1.5), "2 cores (CPU quota of the cgroup, 1.5; the machine has 64)"),
        (Cores(64, 4, None), "4 cores (CPU affinity; the machine has 64)"),
        (Cores(64, 1, 2), "1 core (CPU affinity; the machine has 64)"),
        (Cores(1, 1, None), "1 core"),
    ],
)
def test_words_name_the_limit(read: Cores, text: str) -> None:
    """The number, and what it comes from where that is not the machine."""
    assert str(read) == text


def test_libraries_are_limited_by_a_quota_alone() -> None:
    """Without one, PyTorch counts the cores itself, and may leave out those that share one."""
    assert cores.library_threads(Cores(64, 64, 2)) == {"OMP_NUM_THREADS": "2"}
    assert cores.library_threads(Cores(64, 2, 2)) == {}


# A real cgroup


def run_within(procs: Path, code: str) -> str:
    """What a Python program prints that runs in the cgroup of this `cgroup.procs`."""
    python = shlex.join([sys.executable, "-c", code])
    command = f"echo $$ > {shlex.quote(str(procs))} && exec {python}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_process_with_one_cpu_counts_one_core(one_cpu: Path) -> None:
    """In its cgroup; a process outside of it does not."""
    code = "from halimede_engine import cores; print(cores.quota(), cores.available())"
    assert run_within(one_cpu, code) == "1.0 1"
    assert cores.available() == len(os.sched_getaffinity(0)) or cores.quota() is not None


ENGINE = """
import asyncio, threading
from collections import Counter
from halimede import AsyncEmbedder

async def main():
    model = {"provider": "onnx", "model_id": NAME, "path": PATH}
    async with AsyncEmbedder(config={"models": {"m": model}}) as embedder:
        await embedder.embed(["a text"] * 300)
        names = Counter(thread.name for thread in threading.enumerate())
        print(names["engine-run"], names["engine-urgent"])

asyncio.run(main())
"""


def test_process_with_one_cpu_has_one_run_thread(one_cpu: Path, settings: Settings) -> None:
    """Besides the one for small requests beside bulk, which sleeps without bulk."""
    code = ENGINE.replace("NAME", repr(NAMES["int8"])).replace(
        "PATH", repr(str(settings.repository))
    )
    assert run_within(one_cpu, code) == "1 1"


LIMITED = """
import os
from halimede import cli
os.environ.pop("OMP_NUM_THREADS", None)
try:
    cli.main()
except SystemExit:
    print(os.environ.get("OMP_NUM_THREADS"))
"""


def test_command_limits_the_libraries(one_cpu: Path) -> None:
    """For PyTorch in a build, and for the processes that the command starts."""
    code = f"import sys; sys.argv[1:] = ['--version']\n{LIMITED}"
    assert run_within(one_cpu, code).splitlines()[-1] == "1"


WORKER = """
from pathlib import Path
from halimede.providers.sentence_transformers.provider import _Worker
worker = _Worker("no model is opened")
print("OMP_NUM_THREADS=1" in Path(f"/proc/{worker._process.pid}/environ").read_text().split("\\0"))
worker.close()
"""


def test_process_of_sentence_transformers_is_limited(one_cpu: Path) -> None:
    """Also where a program of the user's starts it, whose own environment stays as it is."""
    assert run_within(one_cpu, WORKER) == "True"


def test_no_number_of_threads_is_taken_from_the_affinity_alone() -> None:
    """One file reads the affinity; `bench scaling` pins servers to its cores."""
    users = {
        path.name
        for folder in ("client", "python_backend", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if any(word in path.read_text() for word in ("sched_getaffinity", "cpu_count("))
    }
    assert users == {"cores.py", "scaling.py"}
