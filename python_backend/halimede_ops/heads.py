"""Per-token outputs of a model: sparse weights, multi-vectors, token embeddings.

The definitions are those of bge-m3 (FlagEmbedding). A sparse weight belongs to a token id: if a
text has the id several times, the largest weight counts. The multi-vectors leave out the first
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from halimede_ops import vectors
from halimede_ops.spec import MULTI_VECTOR, SPARSE, TOKEN_EMBEDDINGS, ModelSpec

NO_TOKEN = -1
"""Id that pads shorter rows of sparse ids."""


def outputs(
    rows: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, spec: ModelSpec
) -> dict[str, np.ndarray]:
    """Make the outputs that clients get of the model's heads: name → array, one row for each text.

    Args:
        rows: head → `[batch, tokens, width]` float32, as the model gives it.
        ids: token ids `[batch, tokens]` int64.
        mask: attention mask `[batch, tokens]` int64.
        spec: the model's spec, for its special tokens.

    Returns:
        SPARSE_IDS and SPARSE_WEIGHTS as in `sparse`; MULTI_VECTORS without the first token, and
        TOKEN_EMBEDDINGS, as in `per_token`; each only if `rows` has its head.

    Raises:
        NonFiniteVector: an output of a token has NaN or infinity.
    """
    rows = {name: per_token(values, mask) for name, values in rows.items()}
    for values in rows.values():
        vectors.check_finite(values)
    named: dict[str, np.ndarray] = {}
    if SPARSE in rows:
        weights = rows[SPARSE][:, :, 0]
        named["SPARSE_IDS"], named["SPARSE_WEIGHTS"] = sparse(ids, weights, mask, spec.special_ids)
    if MULTI_VECTOR in rows:
        named["MULTI_VECTORS"] = rows[MULTI_VECTOR][:, 1:]
    if TOKEN_EMBEDDINGS in rows:
        named["TOKEN_EMBEDDINGS"] = rows[TOKEN_EMBEDDINGS]
    return named


def sparse(
    ids: np.ndarray, weights: np.ndarray, mask: np.ndarray, special_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[batch, longest]` int32, ascending, and their weights `[batch, longest]` float32.

    `ids` and `mask` are `[batch, tokens]` int64, `weights` is `[batch, tokens]` float32. Special
    tokens and weights of 0 are left out. Shorter rows are padded with NO_TOKEN and weight 0.
    """
    counted = (mask != 0) & (weights > 0) & ~np.isin(ids, special_ids)
    rows = [_largest(ids[row, counted[row]], weights[row, counted[row]]) for row in range(len(ids))]
    return padded(rows)


def padded(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[rows, longest]` int32 and weights `[rows, longest]` float32 of rows with ids and
    weights `[n]` each; shorter rows are padded with NO_TOKEN and weight 0.
    """
    longest = max((len(unique) for unique, _ in rows), default=0)
    out_ids = np.full((len(rows), longest), NO_TOKEN, np.int32)
    out_weights = np.zeros((len(rows), longest), np.float32)
    for row, (unique, largest) in enumerate(rows):
        out_ids[row, : len(unique)] = unique
        out_weights[row, : len(unique)] = largest
    return out_ids, out_weights


def _largest(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unique ids, ascending, and the largest weight of each."""
    unique, inverse = np.unique(ids, return_inverse=True)
    largest = np.zeros(len(unique), np.float32)
    np.maximum.at(largest, inverse, weights)
    return unique, largest


def late(vectors_of_tokens: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Make the output that clients get of a late-interaction model: MULTI_VECTORS, padded with rows
    of zeros.

    Vectors of tokens `[batch, tokens, width]` float32, and `kept` `[batch, tokens]`, 1 for each
    token with a vector in the answer → `[batch, longest, width]` float32.

    Raises:
        NonFiniteVector: a vector of a text has NaN or infinity.
    """
    is_kept = kept != 0
    counts = is_kept.sum(axis=1)
    is_used = np.arange(counts.max(initial=0)) < counts[:, None]
    multi_vectors = np.zeros((*is_used.shape, vectors_of_tokens.shape[2]), np.float32)
    multi_vectors[is_used] = vectors_of_tokens[is_kept]
    vectors.check_finite(multi_vectors)
    return {"MULTI_VECTORS": multi_vectors}


def per_token(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The values of the tokens; zeros for padding, whatever the model gives there.

    `values` `[batch, tokens, width]` float32, `mask` `[batch, tokens]` int64 →
    `[batch, tokens, width]` float32.
    """
    return np.where((mask != 0)[:, :, None], values, np.float32(0))
