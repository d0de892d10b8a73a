"""The report of a benchmark: its conclusion in a table, where it was measured, then the details.

A checkout keeps reports in `docs/benchmarks`; elsewhere a report goes to the current directory.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from halimede.config.environment import CHECKOUT
from halimede_engine import cores
from halimede_tools.console import console

FOLDER = CHECKOUT / "docs" / "benchmarks" if CHECKOUT else Path()
"""Where reports are written."""


class Goal(NamedTuple):
    """One thing that must hold."""

    name: str
    measured: str
    bound: str
    """The value that it must reach or not pass, in words: "at most 3"."""
    holds: bool


def publish(
    path: Path, title: str, conclusion: Sequence[str], origin: str, details: Sequence[str]
) -> Path:
    """Print a report on stdout and write it to `path`; the path."""
    text = "\n".join([f"# {title}", "", *conclusion, "", origin, "", *details]) + "\n"
    print(text, end="", flush=True)
    path.write_text(text)
    console.print(f"written to {path}", markup=False)
    return path


def origin(command: str, model: str, packages: Sequence[str]) -> str:
    """Two lines: command, date, commit (without a checkout, halimede's version) and model;
    processor, cores and versions of the `packages` that are installed.
    """
    return (
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {_source()}, {model}.\n"
        f"{_processor()}, {cores.available()} cores, "
        f"{', '.join([f'Python {platform.python_version()}', *_versions(packages)])}."
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    return [_line(columns), "|---" * len(columns) + "|", *(_line(row) for row in rows)]


def goals(listed: Iterable[Goal]) -> list[str]:
    """The lines of a table of goals; those that are missed are bold."""
    return table(
        ["goal", "bound", "measured", "holds"],
        [
            (goal.name, goal.bound, goal.measured, "yes" if goal.holds else "**no**")
            for goal in listed
        ],
    )


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _versions(packages: Sequence[str]) -> list[str]:
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _source() -> str:
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return f"halimede {importlib.metadata.version('halimede')}"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"commit {described.stdout.strip()}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
