"""sentence-transformers in a process of its own."""

from halimede.providers.sentence_transformers.provider import Options, connect

__all__ = ["Options", "connect"]
