"""The README is run, not read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NAMES, ROOT, free_options
from PIL import Image

from halimede import Embedder
from halimede_tools.serve import wheel

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "sh"
    for line in code.splitlines()
    if line.startswith(".venv/bin/halimede")
]


PYTHONPATH = ":".join(
    str(ROOT / part) for part in os.environ.get("PYTHONPATH", "").split(":") if part
)


def environment(server: wheel.Server) -> dict[str, str]:
    return {**os.environ, "HALIMEDE_URL": server.grpc_address}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_written(server: wheel.Server, folder: Path, command: str) -> None:
    """Every halimede command of the README succeeds."""
    words = shlex.split(command.replace(".venv/bin", str(Path(sys.executable).parent)))
    alone = {**environment(server), "PYTHONPATH": PYTHONPATH}
    subprocess.run(words, cwd=folder, env=alone, check=True, capture_output=True)


@pytest.fixture
def folder(server: wheel.Server, tmp_path: Path) -> Path:
    """A folder with the README's configuration in it, on this server's address."""
    for name, text in re.findall(r"`(\S+\.yaml)`:\n\n```yaml\n(.*?)```", README, re.DOTALL):
        (tmp_path / name).write_text(text.replace("127.0.0.1:8001", server.grpc_address))
    (tmp_path / "photos").mkdir()
    for name, colour in (("cat.jpg", "grey"), ("bicycle.png", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "photos" / name)
    for name in ("model_repository", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_as_written(server: wheel.Server, folder: Path, code: str) -> None:
    """Every Python block of the README runs, on this server's address."""
    here = code.replace("127.0.0.1:8001", server.grpc_address)
    alone = {**environment(server), "PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", here], cwd=folder, env=alone, check=True)


def test_the_chain_answers_without_the_server(folder: Path) -> None:
    """The README's configuration gives vectors, from its fallback, when nothing listens."""
    file = folder / "halimede.yaml"
    file.write_text(
        re.sub(r"url: \S+\d", f"url: 127.0.0.1:{free_options().grpc_port}", file.read_text())
    )
    with Embedder(config=file) as embedder:
        os.chdir(folder)
        try:
            result = embedder.embed("hello world")
        finally:
            os.chdir(ROOT)
    assert (result.provider, result.precision) == ("onnx", "int8")


def test_verbs_exist() -> None:
    """Every `make` verb that the README names is in the Makefile."""
    verbs = set(re.findall(r"`make ([a-z-]+)", README)) | set(
        re.findall(r"^make ([a-z-]+)", README, re.M)
    )
    makefile = (ROOT / "Makefile").read_text()
    assert verbs
    assert all(f"\n{verb}:" in makefile for verb in verbs)


def test_models_are_those_served() -> None:
    """The README's table names every ensemble."""
    assert all(f"| `{name}` |" in README for name in NAMES.values())
