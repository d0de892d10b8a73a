"""Builds that run while the server runs. Each ensemble is loaded when its checks pass."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from halimede.config.folders import HOME, writing
from halimede_ops.errors import HalimedeError, ServeError, ServerUnreachable
from halimede_tools.build.repository import served_name
from halimede_tools.console import console
from halimede_tools.deploy.control import Control
from halimede_tools.serve import processes
from halimede_tools.serve.options import Options

NICENESS = 10
"""Niceness of the builds: requests have priority."""
STOP_TIMEOUT_S = 10.0
RETRY_S = 0.5


class Build(NamedTuple):
    """A build of some precisions of a model."""

    model: str
    precisions: tuple[str, ...]

    @property
    def ensembles(self) -> list[str]:
        """Names that the precisions are served under."""
        return [served_name(self.model, precision) for precision in self.precisions]


@contextlib.contextmanager
def running(builds: Sequence[Build], options: Options, log: Path) -> Iterator[Collection[str]]:
    """Run the builds in a process each, one after the other; load each published ensemble into
    the server. Yields the names of the ensembles that were published, a set that grows.

    Leaving ends the current build. The next `halimede build` continues where it stopped.

    Raises:
        ServeError: the log cannot be written.
    """
    thread = _BuildThread(builds, options, log)
    thread.start()
    try:
        yield thread.published
    finally:
        thread.stop()


class _BuildThread:
    """Runs the builds, and loads the ensembles that they publish into the server."""

    def __init__(self, builds: Sequence[Build], options: Options, log: Path) -> None:
        self._builds = builds
        self._options = options
        self._log = log
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()
        self.published: set[str] = set()
        with writing(log, HOME, ServeError):
            opened = log.open("w")
        self._thread = threading.Thread(target=self._run, args=(opened,), daemon=True)

    def _run(self, log: TextIO) -> None:
        with log:
            for build in self._builds:
                process = self._start_process(build, log.fileno())
                if process is None:
                    return
                assert process.stdout is not None
                for line in process.stdout:
                    self._load(line.strip())
                process.wait()
                missing = [name for name in build.ensembles if name not in self.published]
                if missing and not self._stopped.is_set():
                    console.print(
                        f"  [yellow]! not built: {', '.join(missing)} (log: {self._log}). "
                        f"Run: halimede build {build.model}[/]"
                    )

    def start(self) -> None:
        """Start the builds."""
        self._thread.start()

    def stop(self) -> None:
        """End the current build."""
        with self._lock:
            self._stopped.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join(STOP_TIMEOUT_S)

    def _start_process(self, build: Build, log: int) -> subprocess.Popen[str] | None:
        command = [sys.executable, "-m", "halimede", "build", build.model]
        command += ["--precisions", ",".join(build.precisions)]
        with self._lock:
            if self._stopped.is_set():
                return None
            self._process = subprocess.Popen(
                processes.ending_with_this_process(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
            return self._process

    def _load(self, ensemble: str) -> None:
        """Load a published ensemble into the server, as soon as that answers."""
        self.published.add(ensemble)
        http = f"http://{self._options.http_address}"
        while not self._stopped.is_set():
            try:
                with Control(http, key=self._options.control_key) as control:
                    control.load([ensemble])
            except ServerUnreachable:  # it starts, or starts again
                self._stopped.wait(RETRY_S)
            except HalimedeError as error:
                console.print(f"  [yellow]! {ensemble} is built and not served: {error}[/]")
                return
            else:
                console.print(f"  [green]joined[/] {ensemble}")
                return
