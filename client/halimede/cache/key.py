"""The key of a cached vector or other output: a digest of everything that determines it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from halimede.inputs.content import Content, InputKind, OutputKind, length_prefixed, serialise

KEY_BYTES = 20
FORMAT = b"halimede vector2"
"""Domain of the digest, 16 bytes; change it with the format of the keys."""


def keys(
    items: Sequence[Content],
    *,
    space: str,
    precision: str,
    input_type: str | None,
    dims: int,
    kind: InputKind = "text",
    output: OutputKind = "vector",
) -> list[bytes]:
    """Return each item's key: KEY_BYTES bytes of BLAKE2b.

    Two keys are equal only if kind, output, space, precision, input type, dims and item are all
    equal: each field is hashed after its length, the item last. The output type is not part of the
    key, because cached vectors are float32 and are quantised after the cache.
    """
    seed = hashlib.blake2b(digest_size=KEY_BYTES, person=FORMAT)
    # Vectors were cached before there were other outputs: their keys name no output.
    asked = kind if output == "vector" else f"{kind} {output}"
    for field in (asked, space, precision, input_type, str(dims)):
        seed.update(length_prefixed(None if field is None else field.encode()))

    def key(item: Content) -> bytes:
        digest = seed.copy()
        digest.update(serialise(item))
        return digest.digest()

    return [key(item) for item in items]
