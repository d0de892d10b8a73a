"""A benchmark's report: on stdout and in a file, its conclusion first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from halimede_tools.bench import report

PUBLISH = """
from halimede_tools.bench import report
origin = report.origin("halimede bench x", "a-model", ["numpy", "no-such-package"])
goals = report.goals([
    report.Goal("speed", "4", "at least 5", False), report.Goal("errors", "0", "at most 0", True)
])
report.publish(report.FOLDER / "x.md", "X", goals, origin, ["Details."])
"""


def publish(folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run PUBLISH in a folder, with these paths before those of the environment."""
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-P", "-c", PUBLISH],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )


def test_without_a_checkout_a_report_goes_to_the_current_directory(tmp_path: Path) -> None:
    """The same text is on stdout; it names halimede's version, as there is no commit."""
    packages, folder = tmp_path / "lib" / "packages", tmp_path / "work"
    for room in ("client", "python_backend", "tools"):
        for package in (ROOT / room).glob("halimede*"):
            shutil.copytree(package, packages / package.name)
    folder.mkdir()
    done = publish(folder, packages)
    text = (folder / "x.md").read_text()
    assert done.stdout == text
    assert done.stderr == "written to x.md\n"
    title, _, *table, _, command, machine, _, details = text.splitlines()
    assert title == "# X"
    assert table == [
        "| goal | bound | measured | holds |",
        "|---|---|---|---|",
        "| speed | at least 5 | 4 | **no** |",
        "| errors | at most 0 | 0 | yes |",
    ]
    assert re.fullmatch(
        r"`halimede bench x`, \d{4}-\d\d-\d\d, halimede [\d.]+[^ ]*, a-model\.", command
    )
    assert re.search(r"\d+ cores, Python 3[\d.]+, numpy [\d.]+\.$", machine)
    assert details == "Details."


def test_in_a_checkout_reports_are_kept_with_the_docs() -> None:
    """And name the commit."""
    assert report.FOLDER == ROOT / "docs" / "benchmarks"
    assert re.search(r", commit [0-9a-f]{7}", report.origin("halimede bench x", "a-model", []))
