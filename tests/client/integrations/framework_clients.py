"""Arguments of clients, and texts, of the frameworks' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = ["hello world", "What is Triton?", "An ocelot sleeps in the rain.", "naïve 🦊 中文"]
QUERY = "which bird swims?"
DOCUMENTS = ["Wool socks keep feet warm.", "Penguins swim.", "The museum opens at nine."]
Arguments = Callable[[str], dict[str, Any]]
"""Name of a model → arguments of a client for it."""


def in_process(repository: Path, name: str) -> dict[str, Any]:
    """Arguments of a client for a model of a repository, in this process."""
    options = {"provider": "onnx", "model_id": name, "path": str(repository)}
    return {"config": {"models": {name: options}}}


def assert_close(given: Any, expected: Any) -> None:
    """Both are the same vectors or scores, up to rounding."""
    np.testing.assert_allclose(np.asarray(given), np.asarray(expected), atol=1e-5)
