"""What a long verb says on stderr while it works, on a terminal and in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

from conftest import ROOT

from halimede_tools import progress

WORK = """
import time
from halimede_tools import progress
progress.LINE_S = 0.0
with progress.Progress("work", ["first", "second"], rounds=3) as shown:
    for number in range(3):
        for name in ("first", "second"):
            with shown.step(name):
                time.sleep(0.3)
print("result")
"""


def test_a_log_gets_lines_with_the_round_and_the_time_left() -> None:
    """One line a step on stderr; stdout has the result alone."""
    command = [sys.executable, "-c", WORK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "  work, round 1/3: first, time left unknown yet"
    assert [line.rpartition(",")[0] for line in lines[1:]] == [
        "  work, round 1/3: second",
        "  work, round 2/3: first",
        "  work, round 2/3: second",
        "  work, round 3/3: first",
        "  work, round 3/3: second",
    ]
    assert lines[1].endswith(", 2 s left")  # five of 0.3 s: rounded
    assert lines[-1].endswith(", 0 s left")


def test_a_terminal_gets_a_bar() -> None:
    """It names the round and the step, counts the steps and shows the time left."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = ""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            shown += part.decode(errors="replace")
        assert process.stdout is not None
        assert process.stdout.read() == b"result\n"
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "━" in plain
    assert re.search(r"work, round 2/3: second .* 3/6 \d s left", plain)


def test_lines_of_one_round_come_seldom(capsys) -> None:
    """A line at the start of each round; between them none before LINE_S is over."""
    names = [f"step {number}" for number in range(5)]
    with progress.Progress("work", names, rounds=2) as shown:
        for _ in range(2):
            for name in names:
                with shown.step(name):
                    pass
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[1] for line in lines] == [" round 1/2: step 0", " round 2/2: step 0"]


def test_time_left_is_that_of_each_steps_last_run() -> None:
    """A step that takes long counts as long; the estimate for a first run may be given."""
    assert progress.Progress("work", ["first"], rounds=1).left_s() is None
    given = progress.Progress("work", ["first", "second"], rounds=2, step_s=30.0)
    with given.step("first"):
        assert 119 < given.left_s() <= 120
    assert given.left_s() < 61
    assert progress.describe(119.6) == "2 min 00 s left"
    assert progress.describe(59.4) == "59 s left"
