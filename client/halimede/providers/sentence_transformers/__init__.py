"""sentence-transformers in a subprocess."""

from halimede.providers.sentence_transformers.provider import Options, connect

__all__ = ["Options", "connect"]
