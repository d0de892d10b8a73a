"""A progress bar on a terminal, and nothing anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

Advance = Callable[[int], None]
"""Tells how many items more are done."""


@contextlib.contextmanager
def bar(wanted: bool, total: int | None = None) -> Iterator[Advance]:
    """What to tell the bar's progress; the bar is on stderr, if that is a terminal."""
    console = Console(stderr=True)
    shown = wanted and console.is_terminal
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda items: progress.advance(task, items)
