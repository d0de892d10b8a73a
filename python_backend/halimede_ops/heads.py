"""What a model gives for each token, as its users read it: sparse weights, vectors a token.

Definitions are bge-m3's (FlagEmbedding): a sparse weight belongs to a token id, the largest where
a text has the id more than once; the first token has no vector among the multi-vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from halimede_ops.spec import MULTI_VECTOR, SPARSE, TOKEN_EMBEDDINGS, ModelSpec

NO_TOKEN = -1
"""Id that fills a row of sparse ids up to the longest."""


def outputs(
    rows: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, spec: ModelSpec
) -> dict[str, np.ndarray]:
    """A model's further outputs as its users get them: name → array, one row a text.

    `rows` holds each head of the model, `[batch, tokens, width]` float32; `ids` and `mask` are
    `[batch, tokens]` int64.
    """
    found: dict[str, np.ndarray] = {}
    if SPARSE in rows:
        weights = rows[SPARSE][:, :, 0]
        found["SPARSE_IDS"], found["SPARSE_WEIGHTS"] = sparse(ids, weights, mask, spec.special_ids)
    if MULTI_VECTOR in rows:
        found["MULTI_VECTORS"] = per_token(rows[MULTI_VECTOR], mask, first=1)
    if TOKEN_EMBEDDINGS in rows:
        found["TOKEN_EMBEDDINGS"] = per_token(rows[TOKEN_EMBEDDINGS], mask)
    return found


def sparse(
    ids: np.ndarray, weights: np.ndarray, mask: np.ndarray, special_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their weights: `[batch, most]` int32, ascending, and `[batch, most]` float32.

    `ids` and `mask` are `[batch, tokens]` int64, `weights` `[batch, tokens]` float32. Special
    tokens and weights of 0 are left out; shorter rows end in NO_TOKEN with weight 0.
    """
    counted = (mask != 0) & (weights > 0) & ~np.isin(ids, special_ids)
    rows = [_largest(ids[row, counted[row]], weights[row, counted[row]]) for row in range(len(ids))]
    most = max((len(found) for found, _ in rows), default=0)
    out_ids = np.full((len(rows), most), NO_TOKEN, np.int32)
    out_weights = np.zeros((len(rows), most), np.float32)
    for row, (found, largest) in enumerate(rows):
        out_ids[row, : len(found)] = found
        out_weights[row, : len(found)] = largest
    return out_ids, out_weights


def _largest(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, where = np.unique(ids, return_inverse=True)
    largest = np.zeros(len(found), np.float32)
    np.maximum.at(largest, where, weights)
    return found, largest


def per_token(vectors: np.ndarray, mask: np.ndarray, first: int = 0) -> np.ndarray:
    """Vectors of the tokens from `first` on, zeros where a row has no token.

    `vectors` `[batch, tokens, width]` float32, `mask` `[batch, tokens]` int64 →
    `[batch, tokens - first, width]` float32.
    """
    return (vectors * (mask != 0)[:, :, None].astype(np.float32))[:, first:]
