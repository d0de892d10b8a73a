"""Text files with one text a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

from halimede_ops.errors import InvalidInput, InvalidText

LINE_END = re.compile(rb"\r\n|\r|\n")
BOM = b"\xef\xbb\xbf"


def read_lines(source: Path | BinaryIO, name: str) -> list[str]:
    """Return the lines of a UTF-8 file or stream: one text a line, without a byte order mark.

    Only LF, CR LF and CR end a line. `name` names the source in errors.

    Raises:
        InvalidInput: it cannot be read.
        InvalidText: it is not UTF-8.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source.read()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        reason = getattr(error, "strerror", None) or "it is closed"
        raise InvalidInput(f"{name} cannot be read: {reason}.") from None
    lines = LINE_END.split(data.removeprefix(BOM))
    if not lines[-1]:
        lines.pop()
    return [_decoded(line, number, name) for number, line in enumerate(lines, start=1)]


def _decoded(line: bytes, number: int, name: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidText(
            f"{name} is not UTF-8 (line {number}). Convert it, for example with iconv."
        ) from None
