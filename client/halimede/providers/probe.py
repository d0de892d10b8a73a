"""Probes: inputs that are embedded to check a provider's health."""

from __future__ import annotations

from collections.abc import Mapping

from halimede.inputs.content import Content, InputKind, Pair, TextPair

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478"
    "9c63a8070000810080d394534a0000000049454e44ae426082"
)
"""A grey PNG of 1 × 1 pixel."""
PROBES: Mapping[InputKind, Content] = {
    "text": b"health",
    "image": PNG,
    "pair": Pair(b"health", PNG),
    "text_pair": TextPair(b"health", b"health"),
}
