"""Returns freed memory to the operating system."""

from __future__ import annotations

import contextlib
import ctypes


def trim() -> None:
    """Return freed memory to the operating system. glibc otherwise keeps it, for each thread."""
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
