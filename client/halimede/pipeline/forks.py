"""Work of libraries that must not be under way when the process forks."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")

FORK_WAIT_S = 5.0
"""Longest wait of a fork for the work under way."""


class ForkGate:
    """Counts the work under way. A fork waits until the count is 0; new work waits for the fork."""

    def __init__(self) -> None:
        self._within = threading.local()
        self._reset()
        os.register_at_fork(
            before=self._pause, after_in_parent=self._resume, after_in_child=self._reset
        )

    def begin(self) -> None:
        """Note that work begins. Wait for a fork under way."""
        with self._lock:
            if self._forking:
                self._changed.wait_for(lambda: not self._forking, FORK_WAIT_S)
            self._count += 1

    def end(self, _: object = None) -> None:
        """Note that work has ended."""
        with self._lock:
            self._count -= 1
            if self._forking:
                self._changed.notify_all()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Do work of this thread between `begin` and `end`, unless it is part of such work."""
        if getattr(self._within, "work", False):
            yield
            return
        self._within.work = True
        self.begin()
        try:
            yield
        finally:
            self.end()
            self._within.work = False

    def around(self, run: Callable[[A], R]) -> Callable[[A], R]:
        """Return a function that does `work`."""

        def guarded(argument: A) -> R:
            self.begin()
            self._within.work = True
            try:
                return run(argument)
            finally:
                self._within.work = False
                self.end()

        return guarded

    def _pause(self) -> None:
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: not self._count, FORK_WAIT_S)

    def _resume(self) -> None:
        with self._changed:
            self._forking = False
            self._changed.notify_all()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._count = 0
        self._forking = False
