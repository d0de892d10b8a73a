"""Triton as a provider: one model on one or several servers."""

from halimede.providers.triton.provider import Options, connect

__all__ = ["Options", "connect"]
