"""The pages that people read, and the commands and code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    code: str

    @property
    def place(self) -> str:
        """The page's name, for the name of a test."""
        return str(self.page.relative_to(ROOT))


class Command(NamedTuple):
    """A line of a shell block."""

    page: Path
    line: str

    @property
    def place(self) -> str:
        """Page and line, for the name of a test."""
        return f"{self.page.relative_to(ROOT)}: {self.line}"


def blocks(language: str) -> list[Block]:
    """The blocks of every page in this language."""
    return [
        Block(page, name, code)
        for page in PAGES
        for name, code in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.S | re.M)
        if name == language
    ]


def commands() -> list[Command]:
    """The lines of every shell block, without comments."""
    lines = [(block.page, line) for block in blocks("sh") for line in block.code.splitlines()]
    stripped = [Command(page, re.sub(r"(^|\s+)#.*", "", line).strip()) for page, line in lines]
    return [command for command in stripped if command.line]


def named_commands() -> list[Command]:
    """The `halimede` commands within the sentences and tables of every page."""
    unread = re.compile(r"^```.*?^```|<!--.*?-->", re.S | re.M)
    return [
        Command(page, " ".join(command.split()))
        for page in PAGES
        for command in re.findall(r"`(halimede [^`]+)`", unread.sub("", page.read_text()))
    ]


def files(page: Path) -> list[tuple[str, str]]:
    """Name and text of each file that a page gives: its name with a colon, then a block."""
    return re.findall(r"^`(\S+\.yaml)`:\n\n```yaml\n(.*?)^```", page.read_text(), re.S | re.M)
