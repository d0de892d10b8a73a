"""Cache keys of build steps, found from the code itself: no list is kept by hand.

A step's result depends on the source of its module and of every module of ours that this one
imports, directly or not; on the data files beside those of them that read any; on the versions of
the other packages that they import; and on the step's arguments. `code` covers all but the
arguments, which `halimede_tools.build.steps` adds.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from halimede_repository.checksums import sha256

OWN = "halimede"
"""Begins the names of our own packages."""
DISPLAY_ONLY = ("rich",)
"""Packages that show what a step does and decide nothing of its result."""


class Uses(NamedTuple):
    """What a module uses, itself among it."""

    files: dict[str, Path]
    """Module, or module and data file → its file."""
    packages: set[str]
    """Packages of others that are imported, without Python's own."""


def key_of(*parts: str) -> str:
    """One short key of several strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def installed(package: str) -> Path:
    """The folder of one of our top-level packages: a checkout's, or a wheel's in site-packages."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no package {package}")
    return Path(found.origin).parent


def code(module: str, folder_of: Callable[[str], Path] = installed) -> str:
    """The key of a module's code: of everything in its Uses, wherever the files lie."""
    used = uses(module, folder_of)
    files = [f"{name}={sha256(used.files[name])}" for name in sorted(used.files)]
    return key_of(*files, *(version(package) for package in sorted(used.packages)))


def uses(module: str, folder_of: Callable[[str], Path] = installed) -> Uses:
    """What a module uses, found by reading the imports, also those within functions.

    A package's `__init__` counts where a name is imported from it, not where a module in it is.
    """
    used, waiting = Uses({}, set()), [module]
    while waiting:
        name = waiting.pop()
        if name in used.files:
            continue
        used.files[name] = path = _file(name, folder_of)
        tree = ast.parse(path.read_bytes())
        if _reads_data(tree):
            used.files.update(_data_files(name, path.parent))
        for imported, names in _imports(tree):
            top = imported.partition(".")[0]
            if top.startswith(OWN):
                waiting += _modules(imported, names, folder_of)
            elif top not in sys.stdlib_module_names and top not in DISPLAY_ONLY:
                used.packages.add(top)
    return used


@functools.cache
def version(package: str) -> str:
    """The versions of the distributions that a package is imported from: `torch==2.13.0`."""
    names = sorted(_distributions().get(package, []))
    return ",".join(f"{name}=={importlib.metadata.version(name)}" for name in names) or package


@functools.cache
def _distributions() -> dict[str, list[str]]:
    found = importlib.metadata.packages_distributions()
    return {package: sorted(set(names)) for package, names in found.items()}


def _imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Every import that is run: the module, and the names taken from it."""
    for node in _run_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ImportError("our modules import each other by their full names")
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), [alias.name for alias in node.names]


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node, without those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_nodes(node)


def _modules(module: str, names: list[str], folder_of: Callable[[str], Path]) -> set[str]:
    """The modules that `from module import names` uses: those names that are modules, else the
    module itself.
    """
    whole = {f"{module}.{name}" for name in names}
    inside = {name for name in whole if _find(name, folder_of)}
    return inside if names and inside == whole else inside | {module}


def _file(module: str, folder_of: Callable[[str], Path]) -> Path:
    path = _find(module, folder_of)
    if path is None:
        raise ModuleNotFoundError(f"no module {module}")
    return path


def _find(module: str, folder_of: Callable[[str], Path]) -> Path | None:
    package, *inside = module.split(".")
    path = folder_of(package).joinpath(*inside)
    candidates = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file for file in candidates[not inside :] if file.is_file()), None)


def _reads_data(tree: ast.Module) -> bool:
    """Whether a module asks where it lies, which it does to read files beside it."""
    asks = any(isinstance(node, ast.Name) and node.id == "__file__" for node in ast.walk(tree))
    return asks or any(imported == "importlib.resources" for imported, _ in _imports(tree))


def _data_files(module: str, folder: Path) -> dict[str, Path]:
    return {
        f"{module}:{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
