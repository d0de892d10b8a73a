"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

BACKEND = ROOT / "python_backend"
PACKAGES = {
    "halimede_ops": set(),
    "halimede_repository": {"halimede_ops"},
    "halimede_engine": {"halimede_ops"},
    "halimede_launch": {"halimede_ops", "halimede_repository"},
    "adapter": {"halimede_ops", "halimede_engine", "halimede_repository"},
}
"""Package of python_backend/ → those of ours that it may import besides itself."""
BACKENDS = ("tokenizer", "onnxruntime", "pooler", "image", "fusion", "maxsim", "router", "embedder")
SERVER_SIDE = {"numpy", "tokenizers", "PIL", "onnxruntime"}
OWN = {"halimede", "halimede_tools", *PACKAGES}
STANDARD = {"__future__", "collections", "concurrent", "dataclasses", "json", "os", "pathlib"}
STANDARD |= {"atexit", "contextlib", "ctypes", "io", "queue", "re", "sys", "threading", "traceback"}
STANDARD |= {"bisect", "hashlib", "math", "secrets", "signal", "subprocess", "time", "typing"}
STANDARD |= {"socket", "struct", "types", "weakref"}
IMPURE = {"asyncio", "concurrent", "ctypes", "datetime", "logging", "multiprocessing", "os"}
IMPURE |= {"random", "secrets", "signal", "socket", "subprocess", "sys", "threading", "time"}
IMPURE |= {"urllib", "uuid"}
WORKER = "worker.py"
BUILD_ONLY = {"torch", "transformers", "sentence_transformers", "optimum", "nncf", "onnx"}


def imported(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file of a folder with each top-level module that it imports."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module.split(".")[0]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "adapter"])
def test_packages_import_arrays_and_what_is_below_them(package: str) -> None:
    """They need numpy, tokenizers, pillow and onnxruntime, and of ours what is listed."""
    allowed = SERVER_SIDE | STANDARD | {package} | PACKAGES[package]
    assert {name for _, name in imported(BACKEND / package)} <= allowed


def test_every_package_of_the_backend_is_listed() -> None:
    """A new package must say what it may import; folders without `__init__.py` are backends."""
    packages = {path.parent.name for path in BACKEND.glob("*/__init__.py")}
    assert packages == set(PACKAGES)
    folders = {path.parent.name for path in BACKEND.rglob("*.py")}
    assert folders == packages | set(BACKENDS)


def test_operations_are_pure() -> None:
    """No threads, environment, clock, chance, network, process or log."""
    assert not {name for _, name in imported(BACKEND / "halimede_ops")} & IMPURE


def test_tools_are_imported_by_nothing_but_tools() -> None:
    """Neither the client nor what serves needs them."""
    names = {name for folder in ("client", "python_backend") for _, name in imported(ROOT / folder)}
    assert "halimede_tools" not in names


def test_the_adapter_imports_what_is_below_it() -> None:
    """It may speak to Triton; neither to the client nor to the tools."""
    names = {name for _, name in imported(BACKEND / "adapter")}
    assert names & OWN <= {"adapter"} | PACKAGES["adapter"]
    assert not names & BUILD_ONLY


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_import_operations_alone(backend: str) -> None:
    """A backend needs the adapter and what that may import; neither client nor tools."""
    names = {name for _, name in imported(BACKEND / backend)}
    assert names & OWN <= {"adapter"} | PACKAGES["adapter"]
    assert not names & BUILD_ONLY


def test_client_imports_neither_tools_nor_what_builds() -> None:
    """The client needs three packages of the backend, and never torch: a process of its own may."""
    names = {name for path, name in imported(ROOT / "client") if path.name != WORKER}
    assert names & OWN <= {"halimede", "halimede_ops", "halimede_engine", "halimede_repository"}
    assert not names & BUILD_ONLY


OPTIONAL = ["openai", "ollama", "huggingface_hub", "onnxruntime", "redis", "torch"]
OPTIONAL += ["tokenizers", "PIL", "semantic_text_splitter", "prometheus_client"]
OPTIONAL += ["langchain_core", "llama_index", "haystack", "dspy", "lancedb", "mteb"]
OPTIONAL += ["chromadb", "faiss", "lancedb", "psycopg", "pyarrow", "qdrant_client"]


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


def test_what_serves_imports_nothing_that_builds() -> None:
    """`halimede serve` and `halimede deploy` of built models need the extra `server` alone."""
    code = (
        "import sys; from halimede_tools.serve import supervise, container; "
        "from halimede_tools.deploy import control, deployment; from halimede_tools.build import "
        f"candidates, steps; print([name for name in {sorted(BUILD_ONLY)} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_file_knows_model_config() -> None:
    """config.pbtxt is printed from typed messages in one file alone."""
    users = [
        path.name
        for folder in ("tools", "client", "python_backend")
        for path in (ROOT / folder).rglob("*.py")
        if "import model_config_pb2" in path.read_text()
    ]
    assert users == ["model_config.py"]
