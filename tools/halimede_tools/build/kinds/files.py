"""A model folder's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halimede_ops.errors import InvalidModel


def read_json(path: Path) -> Any:
    """The content of one of the model's JSON files.

    Raises:
        InvalidModel: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{path.name} of the model is missing or not JSON") from error
