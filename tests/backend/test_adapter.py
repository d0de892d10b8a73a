"""Triton's side of the backends, with a stand-in for the module that Triton's stub provides."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from halimede_ops.errors import HalimedeError, InvalidText

STAND_IN = """
import sys
from types import ModuleType, SimpleNamespace
utils = ModuleType("triton_python_backend_utils")
utils.TritonError = type("TritonError", (), {"INVALID_ARG": 1, "INTERNAL": 2})
utils.TritonError.__init__ = lambda self, message, code: setattr(self, "message", message)
utils.InferenceResponse = lambda output_tensors=None, error=None: SimpleNamespace(
    outputs=output_tensors, error=error
)
utils.logged = []
utils.Logger = SimpleNamespace(log_error=utils.logged.append)
sys.modules["triton_python_backend_utils"] = utils
"""


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ModuleType]]:
    """`adapter.triton`, and the stand-in that it uses."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("none yet"))
    monkeypatch.delitem(sys.modules, "adapter.triton", raising=False)
    exec(STAND_IN)  # noqa: S102
    yield importlib.import_module("adapter.triton"), sys.modules["triton_python_backend_utils"]
    sys.modules.pop("adapter.triton", None)


def outcomes(responses: list[SimpleNamespace]) -> list[Any]:
    return [one.outputs if one.error is None else one.error.message for one in responses]


def test_one_request_that_cannot_be_computed_fails_alone(adapter: Any) -> None:
    """The requests of the same batch are computed without it."""
    triton, utils = adapter

    def compute(values: list[int]) -> list[int]:
        if 13 in values:
            raise KeyError("s3cret")
        return [value * 2 for value in values]

    told: list[HalimedeError] = []
    responses = triton.answer([1, 13, 2], int, compute, lambda value: [value], told.append)
    assert outcomes(responses) == [
        [2],
        "HalimedeError: internal error in the server; see its log",
        [4],
    ]
    assert len(told) == 1
    assert "KeyError" in utils.logged[0] and "s3cret" not in " ".join(utils.logged)


def test_an_error_that_cannot_be_counted_is_answered(adapter: Any) -> None:
    """A counter that raises is logged; the caller gets the error of the request."""
    triton, utils = adapter

    def read(_: object) -> None:
        raise InvalidText("is wrong.", subject="text", index=0)

    def count(_: object) -> None:
        raise OSError("no metrics")

    responses = triton.answer([1, 2], read, list, list, count)
    assert outcomes(responses) == ["InvalidText: text 0 is wrong."] * 2
    assert "OSError" in utils.logged[0]


def test_what_is_reported_does_not_raise(adapter: Any) -> None:
    """A function that counts runs as it is, and its errors are logged."""
    triton, utils = adapter
    seen: list[int] = []
    triton.reported(seen.append)(1)
    triton.reported(lambda value: seen[value])(7)
    assert seen == [1]
    assert [line.split()[0] for line in utils.logged] == ["IndexError"]


def test_a_lost_thread_ends_the_process() -> None:
    """So that Triton's launcher starts the server again: Triton itself would say it is ready."""
    program = f"{STAND_IN}\nfrom adapter import triton\ntriton.end_process(SystemExit(1))\nprint(1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert b"Traceback" not in done.stderr
