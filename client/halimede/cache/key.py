"""The key of a cached vector: a digest of all that the vector depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

KEY_BYTES = 20
FORMAT = b"halimede vector1"
"""Domain of the digest, 16 bytes; another format of keys takes another."""


def keys(
    texts: Sequence[bytes], *, space: str, precision: str, input_type: str | None, dims: int
) -> list[bytes]:
    """Each text's key, KEY_BYTES bytes of BLAKE2b.

    Two keys are equal only when space, precision, input type, dims and text all are: each field
    is hashed behind its length, the text last. The output type is left out on purpose, as cached
    vectors are float32 and are quantised after the cache.
    """
    seed = hashlib.blake2b(digest_size=KEY_BYTES, person=FORMAT)
    for field in (space, precision, input_type, str(dims)):
        seed.update(_framed(field))

    def key(text: bytes) -> bytes:
        digest = seed.copy()
        digest.update(text)
        return digest.digest()

    return [key(text) for text in texts]


def _framed(field: str | None) -> bytes:
    """The field behind its length; None differs from the empty string."""
    if field is None:
        return b"\xff" * 8
    encoded = field.encode()
    return len(encoded).to_bytes(8, "little") + encoded
