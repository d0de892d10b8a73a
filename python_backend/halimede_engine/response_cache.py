"""A cache of text embeddings, in bounded memory.

Triton's own response cache is not used: its key leaves out which outputs a request asks for. A
request for one output would be cached without the others, and the next request would miss them.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from halimede_ops.spans import Spanned
from halimede_ops.sparse import SparseRow

if TYPE_CHECKING:  # images need no tokenizers
    from halimede_ops.text import Item

ENTRY_BYTES = 400
"""Memory of an entry besides its vector."""
SPARSE_ROW_BYTES = 200
"""What a SparseRow takes besides, for its second array."""
MAX_CHARACTERS = 65_536
"""Longer texts are not cached: a digest of 4 MB takes 4 ms, as long as embedding a short text."""


class Entry(NamedTuple):
    """The cached result of one text."""

    vector: np.ndarray | SparseRow
    """The pooled vector `[dims]` float32, neither truncated nor normalised."""
    tokens: int
    """Tokens of the whole text, including those beyond the model's limit."""


class ResponseCache:
    """A least-recently-used cache of texts. Safe to call from several threads.

    The key of a text is a digest of the whole text, its prompt included. The digest uses a secret
    of this process: the cache holds no text, and nobody can construct two texts with one key.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._secret = secrets.token_bytes(32)
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        """The most recently used entry is last."""
        self._used_bytes = 0
        self._lock = threading.Lock()

    def get(self, texts: Iterable[Item]) -> list[Entry | None]:
        """The entry of each text or pair of texts, prompt included; None for one that is not
        cached, as each of more than MAX_CHARACTERS.
        """
        if not self._size_bytes:
            return [None for _ in texts]
        keys = [self._key(text) if characters(text) <= MAX_CHARACTERS else b"" for text in texts]
        with self._lock:
            entries = [self._entries.get(key) for key in keys]
            for key, entry in zip(keys, entries, strict=True):
                if entry is not None:
                    self._entries.move_to_end(key)
        return entries

    def put(self, texts: Iterable[Item], entries: Sequence[Entry]) -> None:
        """Store the entry of each text, and evict the least recently used ones."""
        if not self._size_bytes or not entries:
            return
        with self._lock:
            for text, entry in zip(texts, entries, strict=True):
                if characters(text) > MAX_CHARACTERS:
                    continue
                # Copy: a vector is a view of the whole run's output. A SparseRow is a copy.
                if isinstance(entry.vector, np.ndarray):
                    entry = entry._replace(vector=entry.vector.copy())
                key = self._key(text)
                self._used_bytes += _bytes(entry) - _bytes(self._entries.pop(key, None))
                self._entries[key] = entry
            while self._used_bytes > self._size_bytes:
                self._used_bytes -= _bytes(self._entries.popitem(last=False)[1])

    def _key(self, text: Item) -> bytes:
        assert not isinstance(text, Spanned)  # its model has a head: no cache
        # A pair has one more string than a text, so their keys cannot be equal.
        strings = text if isinstance(text, tuple) else (text,)
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        for encoded in map(str.encode, strings):
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.digest()


def characters(text: Item) -> int:
    """Characters of a text, or of both texts of a pair."""
    if isinstance(text, Spanned):
        return len(text.text)
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _bytes(entry: Entry | None) -> int:
    """Memory that an entry takes; 0 for none."""
    if entry is None:
        return 0
    second = SPARSE_ROW_BYTES if isinstance(entry.vector, SparseRow) else 0
    return ENTRY_BYTES + second + entry.vector.nbytes
