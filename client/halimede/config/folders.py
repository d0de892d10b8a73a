"""Folders that a command writes to: an error names the folder, and the setting that moves it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from halimede_ops.errors import HalimedeError

HOME = "HALIMEDE_HOME"
REPOSITORY = "HALIMEDE_REPOSITORY"


@contextlib.contextmanager
def writing(
    folder: Path, setting: str, error_class: type[HalimedeError] = HalimedeError
) -> Iterator[None]:
    """Raise an OSError of the block, which writes to the folder, as an error of this class.

    `setting` is the environment variable that names another folder.
    """
    try:
        yield
    except TimeoutError:  # a lock that another process has
        raise
    except OSError as error:
        raise error_class(
            f"{error.filename or folder} cannot be written: {reason(error)}. Free space there, or "
            f"set {setting} to another folder."
        ) from None


def reason(error: OSError) -> str:
    """The system's words for an error. shutil.Error has them for each file; the first are kept."""
    listed = re.search(r"\[Errno \d+\] ([^:\[\]]*)", str(error))
    return error.strerror or (listed[1].strip() if listed else str(error))
