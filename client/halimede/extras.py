"""Optional packages: imported on first use, with an error that names the extra to install."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

from halimede_ops.errors import MissingExtra


def import_optional(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(error.name or module, extra) from None


def check_installed(module: str, extra: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        MissingExtra: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise _missing(module, extra)


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Run what imports packages of an extra.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingExtra):
            raise
        raise _missing(error.name or "a package", extra) from None


def _missing(module: str, extra: str) -> MissingExtra:
    return MissingExtra(f"{module} is not installed. Run: pip install 'halimede[{extra}]'")
