"""The house rules that can be counted: the size of folders and of functions."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from conftest import ROOT

PRODUCT = ("client", "python_backend", "tools")
MAX_FILES = 15
"""Python files in one folder."""
MAX_LINES = 50
"""Lines of one function, its signature and docstring included."""


def python_files() -> list[Path]:
    return [
        path for folder in (*PRODUCT, "tests") for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_no_folder_has_more_than_15_python_files() -> None:
    """Of the product and of its tests."""
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in python_files())
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


def long_functions(path: Path) -> set[str]:
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {
        f"{path.relative_to(ROOT)} {node.name}"
        for node in functions
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_LINES
    }


def test_no_function_is_over_50_lines() -> None:
    """Of the product."""
    product = [path for path in python_files() if path.relative_to(ROOT).parts[0] in PRODUCT]
    assert set().union(*map(long_functions, product)) == set()
