"""A progress bar, shown only on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """How far a call is."""

    def advance(self, inputs: int) -> None:
        """Note that this many inputs more are done."""
        ...

    def restart(self) -> None:
        """Note that the call begins anew."""
        ...


class _NoProgress:
    def advance(self, inputs: int) -> None: ...

    def restart(self) -> None: ...


NO_PROGRESS: Progress = _NoProgress()
"""Progress that nobody sees."""


@contextlib.contextmanager
def bar(enabled: bool, total: int | None = None) -> Iterator[Progress]:
    """Show a bar on stderr, if that is a terminal, and yield what advances it."""
    if not enabled:
        yield NO_PROGRESS
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    disable = not console.is_terminal
    with RichProgress(*columns, console=console, disable=disable, transient=True) as shown:
        task = shown.add_task("", total=total)

        class Bar:
            def advance(self, inputs: int) -> None:
                shown.advance(task, inputs)

            def restart(self) -> None:
                shown.reset(task, total=total)

        yield Bar()
