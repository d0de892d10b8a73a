"""MaxSim: the scores and the order of documents with several vectors each."""

from __future__ import annotations

import numpy as np
import pytest

import halimede
from halimede import InvalidInput
from halimede_ops import maxsim

RANDOM = np.random.default_rng(3)
WIDTH = 8


def vectors(count: int) -> np.ndarray:
    return RANDOM.standard_normal((count, WIDTH)).astype(np.float32)


def by_definition(query: np.ndarray, document: np.ndarray) -> float:
    """ColBERT's sum of maxima, written as in the paper."""
    return float(sum(max(float(q @ d) for d in document) for q in query))


@pytest.mark.parametrize("block", [1, 7, maxsim.BLOCK_VECTORS])
def test_scores_are_the_sums_of_maxima(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of any numbers of vectors score as the definition says, in blocks of any size."""
    monkeypatch.setattr(maxsim, "BLOCK_VECTORS", block)
    query, documents = vectors(5), [vectors(count) for count in (3, 1, 9, 4, 2)]
    expected = [by_definition(query, document) for document in documents]
    scores = maxsim.score(query, documents)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_document_without_vectors_scores_zero() -> None:
    """It takes part wherever it stands; no documents have no scores."""
    query, empty = vectors(4), np.empty((0, WIDTH), np.float32)
    one = vectors(3)
    scores = maxsim.score(query, [empty, one, empty])
    np.testing.assert_allclose(scores, [0, by_definition(query, one), 0], rtol=1e-5)
    assert maxsim.score(query, []).shape == (0,)
    assert maxsim.score(query, [empty]).tolist() == [0]


def test_ranks_are_stable_and_cut_off() -> None:
    """The best document is first, equal ones keep their order, `top_k` cuts off."""
    query = np.eye(2, dtype=np.float32)
    documents = [query * scale for scale in (0.5, 1, 0.5, 2)]
    indices, scores = maxsim.rank(query, documents)
    assert indices.tolist() == [3, 1, 0, 2]
    assert scores.tolist() == [4, 2, 1, 1]
    assert maxsim.rank(query, documents, top_k=2)[0].tolist() == [3, 1]
    with pytest.raises(InvalidInput, match="top_k is 0"):
        maxsim.rank(query, documents, top_k=0)


def test_padding_is_taken_away_at_the_end_alone() -> None:
    """Rows of zeros count as vectors in `score`, so they are taken away before."""
    query, document = -np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)
    padded = np.stack([np.vstack([document, np.zeros((3, 2), np.float32)]), np.ones((5, 2))])
    assert [len(matrix) for matrix in maxsim.without_padding(padded)] == [2, 5]
    assert maxsim.score(query, maxsim.without_padding(padded)).tolist() == [-4, -4]
    assert [len(matrix) for matrix in maxsim.without_padding(np.zeros((1, 4, 2)))] == [0]


def test_shapes_that_do_not_fit_are_named() -> None:
    """The message has the shape given and the shape wanted."""
    with pytest.raises(InvalidInput, match=r"^query has the shape \(8,\)"):
        maxsim.score(vectors(1)[0], [vectors(2)])
    with pytest.raises(InvalidInput, match=r"document 1 has the shape \(2, 3\).*\[vectors, 8\]"):
        maxsim.score(vectors(1), [vectors(2), np.zeros((2, 3))])


def test_the_client_exports_it() -> None:
    """`halimede.maxsim` is the module of the operations."""
    assert halimede.maxsim is maxsim
