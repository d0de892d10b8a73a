"""What texts gave that were embedded lately, in bounded memory.

Triton's own response cache is no safe place: its key leaves out which outputs a request asks for,
so one that asks for fewer takes the others from whoever asks after it.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

ENTRY_BYTES = 400
"""Memory of an entry besides its vector."""


class Embedded(NamedTuple):
    """What one text gave."""

    row: np.ndarray
    """Its pooled vector `[dims]` float32, neither truncated nor normalised."""
    total: int
    """Tokens of the whole text."""


class Recent:
    """The texts that were asked for last, each with what it gave. Safe to call from several
    threads.

    A text is known by a digest of all of it, prompt included, under a key of this process' own: it
    is not kept, and none can be made to look like another.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._key = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, Embedded] = OrderedDict()
        """The one asked for last is last."""
        self._lock = threading.Lock()

    def find(self, texts: Iterable[str]) -> list[Embedded | None]:
        """What each text gave, prompt included; None where it is not kept."""
        if not self._size_bytes:
            return [None for _ in texts]
        digests = [self._digest(text) for text in texts]
        with self._lock:
            found = [self._kept.get(digest) for digest in digests]
            for digest, one in zip(digests, found, strict=True):
                if one is not None:
                    self._kept.move_to_end(digest)
        return found

    def keep(self, texts: Iterable[str], embedded: Sequence[Embedded]) -> None:
        """Keep what each text gave, and let go of those asked for longest ago."""
        if not self._size_bytes or not embedded:
            return
        with self._lock:
            for text, one in zip(texts, embedded, strict=True):
                # A copy: the vector is a part of its whole run's.
                self._kept[self._digest(text)] = one._replace(row=one.row.copy())
            most = self._size_bytes // (ENTRY_BYTES + embedded[0].row.nbytes)
            while len(self._kept) > most:
                self._kept.popitem(last=False)

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(), key=self._key, digest_size=16).digest()
