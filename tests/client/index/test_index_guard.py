"""The guard over every store: what it records, and what it refuses."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from index_stores import DIMS, TEXTS, Collections

from halimede import Embedder, Embeddings, Guard, InvalidInput, SpaceRefused
from halimede.index import SpaceRecord

pytest_plugins = ("index_fixtures",)
IDS = list(range(1, len(TEXTS) + 1))


def extras(store: Collections) -> dict[str, Any]:
    """Texts and fields, where the store keeps them."""
    if not store.keeps_texts:
        return {}
    return {"texts": TEXTS, "fields": [{"n": i} for i in IDS]}


def written(store: Collections, result: Embeddings, name: str = "articles") -> Guard:
    """A guard of a new collection with these vectors."""
    store.create(name)
    made = store.guard(name)
    made.write(IDS, result, **extras(store))
    return made


def test_the_first_write_records_the_space(store: Collections, result: Embeddings) -> None:
    """Another guard reads the record; rows come back with texts and fields, the best first; the
    metadata of the collection's user are kept.
    """
    written(store, result)
    other = store.guard("articles")
    assert other.record == SpaceRecord.of(result)
    assert other.store.count() == len(TEXTS)
    [matches, _] = other.query(dataclasses.replace(result, vectors=result.vectors[[7, 3]]), k=3)
    best, second, _ = matches
    assert int(best.id) == IDS[7] != int(second.id)
    if store.keeps_texts:
        assert (best.text, best.fields["n"]) == (TEXTS[7], IDS[7])
    assert store.own_metadata("articles") == store.mine


def test_a_row_is_replaced(store: Collections, result: Embeddings) -> None:
    """A second write of the same ids adds no row, and the new vectors are found."""
    docs = written(store, result)
    turned = dataclasses.replace(result, vectors=np.roll(result.vectors, 1, axis=0))
    store.guard("articles").write(IDS, turned, **extras(store))
    assert docs.store.count() == len(TEXTS)
    one = dataclasses.replace(result, vectors=result.vectors[:1])
    [[best]] = store.guard("articles").query(one, k=1)
    assert int(best.id) == IDS[1]


@pytest.mark.parametrize(
    "change",
    [
        {"space": "0" * 16},
        {"precision": "int8"},
        {"output_type": "float16"},
        {"dims": DIMS // 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_in_one_fact_is_refused(
    store: Collections, result: Embeddings, change: dict[str, Any]
) -> None:
    """Space, precision, output type and dims, at a write and at a query; both sides are named, and
    nothing is written.
    """
    docs = written(store, result)
    changed = dataclasses.replace(result, **change)
    if "dims" in change:
        changed = dataclasses.replace(changed, vectors=result.vectors[:, : DIMS // 2])
    for use in (
        lambda: docs.write([100], dataclasses.replace(changed, vectors=changed.vectors[:1])),
        lambda: docs.query(changed),
        lambda: docs.checked(changed),
    ):
        with pytest.raises(SpaceRefused) as caught:
            use()
        name, value = next(iter(change.items()))
        assert "articles" in str(caught.value)
        assert str(value) in str(caught.value)
        assert str(getattr(result, name)) in str(caught.value)
    assert docs.store.count() == len(TEXTS)


def test_another_model_is_refused(
    store: Collections, real: Embedder, hashed: Embedder, result: Embeddings, other: Embeddings
) -> None:
    """Vectors of another model with as many dims are refused at a write, at a query, and when the
    program starts; those of the model pass.
    """
    docs = written(store, result)
    for use in (
        lambda: docs.write(IDS, other),
        lambda: docs.query(other),
        lambda: docs.check(hashed),
    ):
        with pytest.raises(SpaceRefused, match=f"{result.space}.*{other.space}"):
            use()
    docs.check(real)
    assert docs.checked(result) is result.vectors


def test_vectors_without_a_record_are_refused_until_adopted(
    store: Collections, real: Embedder, hashed: Embedder, result: Embeddings
) -> None:
    """Neither written nor queried; adopted only by the model that gives the same vectors."""
    store.create("articles")
    store.fill("articles", IDS, result.vectors, TEXTS)
    docs = store.guard("articles")
    for use in (
        lambda: docs.write(IDS, result),
        lambda: docs.query(result),
        lambda: docs.check(real),
    ):
        with pytest.raises(SpaceRefused, match="no record"):
            use()
    if store.keeps_texts:
        with pytest.raises(SpaceRefused, match="mean cosine"):
            docs.adopt(hashed)
        assert docs.record is None
        docs.adopt(real)
    else:
        with pytest.raises(InvalidInput, match="texts"):
            docs.adopt(real)
        docs.adopt(result)
    assert store.guard("articles").record == SpaceRecord.of(result)
    assert store.own_metadata("articles") == store.mine
    [[best]] = docs.query(dataclasses.replace(result, vectors=result.vectors[5:6]), k=1)
    assert int(best.id) == IDS[5]


def test_a_record_is_replaced_only_on_purpose(
    store: Collections, result: Embeddings, other: Embeddings
) -> None:
    """A second adoption of another space is refused without `replace`."""
    docs = written(store, result)
    with pytest.raises(SpaceRefused):
        docs.adopt(other)
    assert docs.record == SpaceRecord.of(result)
    docs.adopt(other, replace=True)
    assert docs.record == SpaceRecord.of(other)
    assert store.own_metadata("articles") == store.mine


def test_an_adopted_record_has_the_length_of_the_vectors(
    store: Collections, result: Embeddings
) -> None:
    """A record of another width than that of the vectors cannot be adopted."""
    store.create("articles")
    store.fill("articles", IDS, result.vectors, TEXTS)
    record = dataclasses.replace(SpaceRecord.of(result), dims=DIMS // 2)
    with pytest.raises(SpaceRefused, match=str(DIMS)):
        store.guard("articles").adopt(record)
    assert store.guard("articles").record is None


@pytest.mark.parametrize("number", range(3))
def test_of_two_first_writers_at_most_one_wins(
    store: Collections, result: Embeddings, other: Embeddings, number: int
) -> None:
    """Writers of two spaces that both find an empty collection: all vectors in it are of the
    recorded space, and who is refused knows it.
    """
    name = f"race{number}"
    store.create(name)
    guards = {key: store.guard(name) for key in ("ours", "theirs")}
    both = threading.Barrier(2)
    outcome: dict[str, Exception | None] = {}

    def run(key: str, given: Embeddings, first: int) -> None:
        both.wait()
        for row in range(8):
            try:
                guards[key].write(
                    [first + row], dataclasses.replace(given, vectors=given.vectors[:1])
                )
                outcome.setdefault(key, None)
            except SpaceRefused as error:
                outcome[key] = error
                return

    threads = [
        threading.Thread(target=run, args=("ours", result, 1)),
        threading.Thread(target=run, args=("theirs", other, 101)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [key for key in ("ours", "theirs") if outcome[key] is None]
    assert len(won) <= 1
    docs = store.guard(name)
    assert docs.store.count() == 8 * len(won)
    if won:
        assert docs.record == SpaceRecord.of({"ours": result, "theirs": other}[won[0]])


def test_other_precisions_of_the_space_are_accepted_on_purpose(
    store: Collections, result: Embeddings
) -> None:
    """A guard that names them takes them; another space is still refused."""
    docs = written(store, result)
    lenient = Guard(docs.store, precisions=("fp16",))
    fp16 = dataclasses.replace(result, precision="fp16")
    assert len(lenient.query(fp16)) == len(TEXTS)
    for refused in (
        dataclasses.replace(result, precision="int8"),
        dataclasses.replace(fp16, space="0" * 16),
    ):
        with pytest.raises(SpaceRefused):
            lenient.query(refused)


def test_an_empty_collection_is_queried(store: Collections, result: Embeddings) -> None:
    """It gives nothing, and records nothing."""
    store.create("articles")
    docs = store.guard("articles")
    one = dataclasses.replace(result, vectors=result.vectors[:1])
    assert docs.query(one) == [[]]
    assert docs.record is None


def test_rows_and_ids_must_match(store: Collections, result: Embeddings) -> None:
    """Too few ids are refused before anything is recorded."""
    store.create("articles")
    docs = store.guard("articles")
    with pytest.raises(InvalidInput, match="ids"):
        docs.write([1, 2], result)
    with pytest.raises(InvalidInput, match="Embeddings"):
        docs.write([1], result.vectors[:1])  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="ubinary"):
        docs.write(IDS, dataclasses.replace(result, output_type="ubinary"))
    assert docs.record is None
