"""Programs that are not Python packages: `python3 programs.py serve|test` installs them on Debian.

As root on Debian or Ubuntu it installs the missing programs. Elsewhere it prints the missing
programs and the command that installs them; the tests that need them are then skipped. A checkout
runs it before it has a virtual environment, so it imports the standard library alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
DEPENDENCIES_ONLY = ("--no-install-recommends",)


def libpython() -> Path | None:
    """The shared library of the running Python, or None. Triton's Python stub links it."""
    name = str(sysconfig.get_config_var("INSTSONAME"))
    folders = [sysconfig.get_config_var("LIBDIR") or "/", *LIBRARIES]
    paths = [Path(folder) / name for folder in folders if ".so" in name]
    return next((path for path in paths if path.exists()), None)


def _has_venv() -> bool:
    return all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))


def _is_on_path(program: str) -> Callable[[], bool]:
    return lambda: shutil.which(program) is not None


PACKAGES: Mapping[str, tuple[str, Callable[[], bool]]] = {
    "venv": ("python3-venv", _has_venv),
    "libpython": (f"lib{PYTHON}", lambda: libpython() is not None),
    "curl": ("curl", _is_on_path("curl")),
    "redis-server": ("redis-server", _is_on_path("redis-server")),
    "promtool": ("prometheus", _is_on_path("promtool")),
    "chromedriver": ("chromium-driver", _is_on_path("chromedriver")),  # with chromium
    "faketime": ("faketime", FAKETIME.exists),
}
"""Program → its Debian package, and a function that says whether it is installed."""
PROGRAMS_BY_USE = {"serve": ("venv", "libpython"), "test": tuple(PACKAGES)}
"""Use → the programs that it needs."""


def install_command(program: str) -> str:
    """The command that installs a missing program; empty if it is installed."""
    package, is_installed = PACKAGES[program]
    return "" if is_installed() else f"apt-get install {package}"


def install(use: str) -> int:
    """Install the programs that a use needs, or print how; return the exit status.

    A missing program is an error for `serve` only.
    """
    missing = [name for name in PROGRAMS_BY_USE[use] if install_command(name)]
    if not missing:
        return 0
    packages = [PACKAGES[name][0] for name in missing]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing {', '.join(packages)} from Debian's packages …", flush=True)
        apt = ["apt-get", "-qq", *DEPENDENCIES_ONLY]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], [*apt, "install", "--yes", *packages]):
            status = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, check=False
            ).returncode
            if status:
                return status
        return 0
    print(f"Not installed: {', '.join(missing)}. On Debian: apt-get install {' '.join(packages)}")
    if use == "serve":
        return 1
    print("The tests that need them are skipped.")
    return 0


if __name__ == "__main__":
    sys.exit(install(sys.argv[1]))
