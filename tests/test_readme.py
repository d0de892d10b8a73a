"""The README is run, not read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NAMES, ROOT

from tools import triton

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


def environment(server: triton.Server) -> dict[str, str]:
    return {**os.environ, "HALIMEDE_URL": server.grpc_address}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_written(server: triton.Server, command: str) -> None:
    """Every halimede command of the README succeeds."""
    words = shlex.split(command.replace(".venv/bin", str(Path(sys.executable).parent)))
    subprocess.run(words, cwd=ROOT, env=environment(server), check=True, capture_output=True)


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_as_written(server: triton.Server, code: str) -> None:
    """Every Python block of the README runs, on this server's address."""
    here = code.replace("127.0.0.1:8001", server.grpc_address)
    subprocess.run([sys.executable, "-c", here], env=environment(server), check=True)


def test_verbs_exist() -> None:
    """Every `make` verb that the README names is in the Makefile."""
    verbs = set(re.findall(r"`make ([a-z]+)", README)) | set(
        re.findall(r"^make (\w+)", README, re.M)
    )
    makefile = (ROOT / "Makefile").read_text()
    assert verbs
    assert all(f"\n{verb}:" in makefile for verb in verbs)


def test_models_are_those_served() -> None:
    """The README's table names every ensemble."""
    assert all(f"| `{name}` |" in README for name in NAMES.values())
