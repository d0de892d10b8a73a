"""A progress bar, shown only on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Advances the bar by this many items."""


@contextlib.contextmanager
def bar(enabled: bool, total: int | None = None) -> Iterator[Advance]:
    """Yield a function that advances the bar, which is on stderr, if that is a terminal."""
    if not enabled:
        yield lambda items: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    disable = not console.is_terminal
    with Progress(*columns, console=console, disable=disable, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda items: progress.advance(task, items)
