"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

OPS = ROOT / "python_backend" / "halimede_ops"
SERVER_SIDE = {"numpy", "tokenizers", "PIL", "onnxruntime"}
OWN = {"halimede", "halimede_ops", "tools", "triton_adapter", "triton_metrics"}
STANDARD = {"__future__", "collections", "concurrent", "dataclasses", "json", "os", "pathlib"}
STANDARD |= {"contextlib", "ctypes", "io", "queue", "re", "sys", "threading", "traceback"}
STANDARD |= {"bisect", "hashlib", "math", "secrets", "typing"}
WORKER = "sentence_transformers_worker.py"
BUILD_ONLY = {"torch", "transformers", "sentence_transformers", "optimum", "nncf", "onnx"}


def imported(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file of a folder with each top-level module that it imports."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module.split(".")[0]


def test_operations_import_only_themselves_and_arrays() -> None:
    """halimede_ops needs numpy, tokenizers, pillow and onnxruntime, and nothing of ours."""
    allowed = SERVER_SIDE | STANDARD | {"halimede_ops"}
    assert {name for _, name in imported(OPS)} <= allowed


@pytest.mark.parametrize("backend", ["tokenizer", "onnxruntime", "pooler", "image", "fusion"])
def test_backends_import_operations_alone(backend: str) -> None:
    """A backend needs what speaks to Triton, and halimede_ops; neither client nor tools."""
    names = {name for _, name in imported(ROOT / "python_backend" / backend)}
    assert names & OWN <= {"halimede_ops", "triton_adapter", "triton_metrics"}
    assert not names & BUILD_ONLY


def test_client_imports_neither_tools_nor_what_builds() -> None:
    """The client needs halimede_ops, and never torch: a process of its own may."""
    names = {name for path, name in imported(ROOT / "client") if path.name != WORKER}
    assert names & OWN <= {"halimede", "halimede_ops"}
    assert not names & BUILD_ONLY


OPTIONAL = ["openai", "ollama", "huggingface_hub", "onnxruntime", "redis", "torch"]


@pytest.mark.parametrize(
    ("module", "later"),
    [("halimede", [*OPTIONAL, "rich", "yaml", "opentelemetry"]), ("halimede.cli", OPTIONAL)],
)
def test_packages_are_imported_on_first_use(module: str, later: list[str]) -> None:
    """Opening an embedder over Triton imports no SDK, no engine and no cache server's client, and
    outside the command line nothing that draws or reads a configuration's file.
    """
    code = (
        f"import sys, halimede, {module}; halimede.Embedder().close(); "
        f"print([name for name in {later} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_file_knows_model_config() -> None:
    """config.pbtxt is printed from typed messages in tools/config.py alone."""
    users = [
        path.name
        for folder in ("tools", "client", "python_backend")
        for path in (ROOT / folder).rglob("*.py")
        if "import model_config_pb2" in path.read_text()
    ]
    assert users == ["config.py"]
