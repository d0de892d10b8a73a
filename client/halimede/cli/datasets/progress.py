"""Progress of a long job on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halimede.bulk import Done

LINE_S = 30.0
"""Least time between two lines, where there is no terminal."""


@contextlib.contextmanager
def shown(title: str) -> Iterator[Callable[[Done], None]]:
    """Show rows done, rows a second and the time left, and yield what takes a job's progress."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    began: tuple[float, int] | None = None
    last_s = 0.0
    task = bar.add_task("", total=None, rate="")

    def show(done: Done) -> None:
        nonlocal began, last_s
        now = time.monotonic()
        if began is None:
            began, last_s = (now, done.rows), now
        rate = _rate(done, now - began[0], began[1])
        bar.update(task, total=done.total, completed=done.rows, rate=rate)
        if not console.is_terminal and now - last_s >= LINE_S:
            last_s = now
            console.print(f"{title} {done.rows:,} of {done.total:,} rows, {rate}", highlight=False)

    with bar:
        yield show


def _rate(done: Done, seconds: float, first: int) -> str:
    """Return the rows a second of this run, and the time left at that rate."""
    rows = done.rows - first
    if rows <= 0 or seconds <= 0:
        return ""
    left_s = round((done.total - done.rows) * seconds / rows)
    hours, minutes = left_s // 3600, left_s // 60 % 60
    return f"{rows / seconds:,.0f} rows/s, {hours}:{minutes:02}:{left_s % 60:02} left"
