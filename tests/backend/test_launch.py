"""What starts Triton in NVIDIA's container, as it lies there: beside `halimede_ops` alone."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODEL, ROOT, version_folder

from halimede_launch import watch
from halimede_repository import configs
from halimede_tools.serve import container_files
from halimede_tools.settings import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder from which it is run."""
    for name in container_files.LAUNCH_PACKAGES:
        (tmp_path / name).symlink_to(ROOT / "python_backend" / name)
    return tmp_path


@pytest.fixture
def repository(settings: Settings, folder: Path) -> Path:
    """The default model in FP32, with a candidate that has no share."""
    copy = folder / "models"
    config = (settings.repository / MODEL / configs.CONFIG).read_text()
    for name in (MODEL, *configs.steps(config)):
        shutil.copytree(settings.repository / name, copy / name)
    shutil.copytree(copy / MODEL, copy / f"{MODEL}{configs.CANDIDATE}")
    return copy


def started(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run with the standard library and what lies in the folder."""
    begun = [sys.executable, "-S", "-E", "-m", "halimede_launch.start", *command]
    return subprocess.run(begun, cwd=folder, capture_output=True, text=True, timeout=60)


def test_every_model_is_named_but_candidates_without_a_share(
    folder: Path, repository: Path
) -> None:
    """`--load-model=*` becomes what the wheel's Triton loads; other arguments stay."""
    done = started(folder, "echo", f"--model-repository={repository}", "--load-model=*", "--more")
    assert done.stdout.split() == [
        f"--model-repository={repository}",
        "--more",
        f"--load-model={MODEL}",
    ]
    named = started(folder, "echo", f"--model-repository={repository}", "--load-model=none")
    assert named.returncode == 1
    assert named.stderr.startswith("error: the repository has no built model 'none'")


def test_control_is_closed_or_behind_a_key(folder: Path, repository: Path) -> None:
    """Closed: a key that differs each time; with a file, the key in it."""
    command = ["echo", f"--model-repository={repository}", "--load-model=*", "--control-closed"]
    closed = {started(folder, *command).stdout for _ in range(2)}
    assert len(closed) == 2
    assert all(told.count("halimede-control-key=") == 2 for told in closed)
    (folder / "key").write_text("known\n")
    told = started(folder, *command, f"--control-key-file={folder / 'key'}").stdout
    assert told.count("halimede-control-key=known ") == 2
    assert "--control-" not in told


@pytest.mark.parametrize(
    ("step", "file"),
    [("onnx", "model.onnx"), ("onnx", "model.onnx.data"), ("tokenizer", "tokenizer.json")],
)
def test_a_changed_byte_is_not_started(
    folder: Path, repository: Path, step: str, file: str
) -> None:
    """One line names model, file and what to do; nothing is started."""
    path = version_folder(repository / f"{MODEL}-{step}") / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    done = started(folder, "echo", f"--model-repository={repository}", "--load-model=*")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: model {MODEL} did not load: {file} is not what was built; build the model again\n"
    )


def test_a_lost_process_ends_it(folder: Path, repository: Path) -> None:
    """A command that goes on without its killed child is killed, and the log says why."""
    goes_on = (
        "import subprocess, sys, time; lost = subprocess.Popen(['sleep', '60']); "
        "lost.kill(); time.sleep(60)"
    )
    program = folder / "triton"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{goes_on}"\n')
    program.chmod(0o755)
    done = started(folder, str(program), f"--model-repository={repository}", "--load-model=*")
    assert done.returncode == 128 + signal.SIGKILL
    assert watch.CHILD_DIED in done.stderr
