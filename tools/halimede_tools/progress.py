"""Progress on stderr: what runs, which round, and how long is left.

A terminal gets a bar, anything else a line every few seconds. stdout stays the result's.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from halimede_tools.console import console

LINE_S = 5.0
"""Least time between two lines of one round, where there is no terminal."""


class Progress:
    """Shows how far some work is: the `steps` of a title, each done `rounds` times, in any order.

    The time left is estimated from how long each step took the last time. `step_s` is the estimate
    for a step that has not run yet; None: the mean of those that have.
    """

    def __init__(
        self, title: str, steps: Sequence[str], rounds: int = 1, step_s: float | None = None
    ) -> None:
        self._title = title
        self._rounds = rounds
        self._step_s = step_s
        self._durations_s: dict[str, list[float]] = {step: [] for step in steps}
        self._began = 0.0
        """When the step that runs began."""
        self._line = (0, 0.0)
        """Round and time of the last line."""
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Left(self),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=len(steps) * rounds)

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bar.stop()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show that a step runs, for as long as the block does."""
        durations_s = self._durations_s[name]
        self._began = time.monotonic()
        self._show(name, len(durations_s) + 1)
        yield
        durations_s.append(time.monotonic() - self._began)
        self._bar.advance(self._task)

    def left_s(self) -> float | None:
        """Seconds until all is done; None while there is nothing to estimate them from."""
        last_s = [durations_s[-1] for durations_s in self._durations_s.values() if durations_s]
        unknown_s = self._step_s
        if unknown_s is None:
            if not last_s:
                return None
            unknown_s = statistics.mean(last_s)
        left_s = sum(
            (self._rounds - len(durations_s)) * (durations_s[-1] if durations_s else unknown_s)
            for durations_s in self._durations_s.values()
        )
        return max(0.0, left_s - (time.monotonic() - self._began))

    def _show(self, name: str, number: int) -> None:
        which = f"{self._title}, round {number}/{self._rounds}: {name}"
        self._bar.update(self._task, description=which)
        line_round, line_at = self._line
        if console.is_terminal or (number == line_round and self._began < line_at + LINE_S):
            return
        self._line = (number, self._began)
        console.print(f"  {which}, {describe(self.left_s())}", markup=False)


class _Left(ProgressColumn):
    """The time left, counted down between steps."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(describe(self._progress.left_s()))


def describe(left_s: float | None) -> str:
    """The time left in words."""
    if left_s is None:
        return "time left unknown yet"
    minutes, seconds = divmod(round(left_s), 60)
    return f"{minutes} min {seconds:02} s left" if minutes else f"{seconds} s left"
