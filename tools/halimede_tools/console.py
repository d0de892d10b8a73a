"""The console of the tools: progress and warnings on stderr, so that stdout stays the result's."""

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
