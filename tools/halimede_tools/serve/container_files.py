"""The backends and packages that halimede adds to NVIDIA's Triton image: the one list of them.

`python3 -m halimede_tools.serve.container_files PYTHON_BACKEND FOLDER` lays them out for
deploy/gpu.Dockerfile. It runs in NVIDIA's image, so it imports the standard library alone and runs
on Python 3.10.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

BACKEND_DIRECTORY = "/opt/tritonserver/backends"
BACKENDS = (
    "tokenizer",
    "pooler",
    "image",
    "fusion",
    "maxsim",
    "router",
    "adapter",
    "halimede_engine",
    "halimede_ops",
    "halimede_repository",
)
"""Folders that go into Triton's backend directory. Our `onnxruntime` is not one of them: it would
replace the C++ backend of that name."""
LAUNCH_DIRECTORY = "/opt/halimede"
"""Folder that `halimede_launch` runs in. Triton does not import from it."""
LAUNCH_PACKAGES = ("halimede_launch", "halimede_ops", "halimede_repository")
REQUIREMENTS = ("tokenizers", "pillow")
"""Python packages that the backends import and NVIDIA's image does not have."""


def targets() -> dict[str, str]:
    """Path in the container → name of the backend or package that goes there."""
    backends = {f"{BACKEND_DIRECTORY}/{name}": name for name in BACKENDS}
    return backends | {f"{LAUNCH_DIRECTORY}/{name}": name for name in LAUNCH_PACKAGES}


def lay_out(python_backend: Path, folder: Path) -> None:
    """Copy a checkout's backends to `folder/root`, and write `folder/requirements.txt`."""
    for target, name in targets().items():
        shutil.copytree(
            python_backend / name,
            folder / "root" / target.lstrip("/"),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    (folder / "requirements.txt").write_text("".join(f"{name}\n" for name in REQUIREMENTS))


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
