"""A progress bar on a terminal, and nothing anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Tells how many items more are done."""


@contextlib.contextmanager
def bar(wanted: bool, total: int | None = None) -> Iterator[Advance]:
    """What to tell the bar's progress; the bar is on stderr, if that is a terminal."""
    if not wanted:
        yield lambda items: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    off = not console.is_terminal
    with Progress(*columns, console=console, disable=off, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda items: progress.advance(task, items)
