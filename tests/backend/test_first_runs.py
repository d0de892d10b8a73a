"""The first runs of a shape do not overlap: with which OpenVINO that was checked, and the check."""

from __future__ import annotations

import os
from collections import Counter
from importlib import metadata

import first_runs

from halimede_engine import session

PROCESSES = int(os.environ.get("HALIMEDE_FIRST_RUNS", "1"))


def test_the_guard_was_checked_with_the_installed_release() -> None:
    """Another release may give wrong vectors or hang in another way: it must be checked first."""
    installed = metadata.version("onnxruntime-openvino")
    assert installed in session.FIRST_RUNS_CHECKED, (
        f"onnxruntime-openvino {installed} is installed, and the guard against simultaneous first "
        f"runs was checked with {', '.join(session.FIRST_RUNS_CHECKED)}. Run "
        "`python tests/first_runs.py 200`, and follow session.FIRST_RUNS_CHECKED."
    )


def test_simultaneous_first_runs_give_right_vectors() -> None:
    """In fresh processes, of which HALIMEDE_FIRST_RUNS gives the number, with the guard."""
    seen = first_runs.count(first_runs.GUARDED, PROCESSES)
    assert seen == Counter({first_runs.RIGHT: PROCESSES})
