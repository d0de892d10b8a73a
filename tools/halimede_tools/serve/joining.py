"""Models that are still being built while the server runs: each joins it when it is checked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from halimede_ops.errors import HalimedeError
from halimede_tools.build.repository import served_name
from halimede_tools.console import console
from halimede_tools.deploy.control import Control
from halimede_tools.serve.options import Options
from halimede_tools.serve.wheel import DIE_WITH_PARENT

NICENESS = 10
"""Of the builds: requests go before them."""
ENDS_IN_S = 10.0


class Build(NamedTuple):
    """A build of a model that goes on beside the server."""

    model: str
    precisions: tuple[str, ...]

    @property
    def ensembles(self) -> list[str]:
        """Names that they are served under."""
        return [served_name(self.model, precision) for precision in self.precisions]


@contextlib.contextmanager
def building(builds: Sequence[Build], options: Options, log: Path) -> Iterator[Collection[str]]:
    """Build each model in a process of its own, one after the other, and load each ensemble into
    the running server when it is published; the names of those that have joined. What is under way
    on leaving is ended: the next build goes on where it stopped.
    """
    worker = _Builder(builds, options, log)
    worker.start()
    try:
        yield worker.joined
    finally:
        worker.stop()


class _Builder:
    """Runs the builds, and tells the server of what they publish."""

    def __init__(self, builds: Sequence[Build], options: Options, log: Path) -> None:
        self._builds = builds
        self._options = options
        self._log = log
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self.joined: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with self._log.open("w") as log:
            for build in self._builds:
                process = self._started(build, log.fileno())
                if process is None:
                    return
                assert process.stdout is not None
                for line in process.stdout:
                    self._join(line.strip())
                process.wait()
                missing = [name for name in build.ensembles if name not in self.joined]
                if missing and not self._stopped:
                    console.print(
                        f"  [yellow]! not built: {', '.join(missing)} (log: {self._log}). "
                        f"Run: halimede build {build.model}[/]"
                    )

    def start(self) -> None:
        """Begin the builds."""
        self._thread.start()

    def stop(self) -> None:
        """End what is under way."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()
        self._thread.join(ENDS_IN_S)

    def _started(self, build: Build, log: int) -> subprocess.Popen[str] | None:
        words = ["build", build.model, "--precisions", ",".join(build.precisions)]
        with self._lock:
            if self._stopped:
                return None
            self._process = subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, sys.executable, "-m", "halimede", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
            return self._process

    def _join(self, ensemble: str) -> None:
        """Load an ensemble that was just published."""
        self.joined.add(ensemble)
        http = f"http://{self._options.http_host}:{self._options.http_port}"
        try:
            with Control(http, key=self._options.control_key) as control:
                control.load([ensemble])
        except HalimedeError as error:
            if not self._stopped:
                console.print(f"  [yellow]! {ensemble} is built and not served: {error}[/]")
        else:
            console.print(f"  [green]joined[/] {ensemble}")
