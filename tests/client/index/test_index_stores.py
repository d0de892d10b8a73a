"""What is particular to one store, and what no store can read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import lancedb
import numpy as np
import psycopg
import pyarrow as pa
import pytest
import qdrant_client
from index_stores import DIMS, TEXTS, Chroma, Collections, PgVector, import_chroma
from qdrant_client import models

from halimede import Embedder, Embeddings, InvalidInput, MissingExtra, SpaceRefused, guard
from halimede.index import SpaceRecord, open_store, reembed
from halimede.index.record import FORMAT
from halimede.index.stores.faiss import SUFFIX
from halimede_tools.settings import Settings

pytest_plugins = ("index_fixtures",)
IDS = list(range(1, len(TEXTS) + 1))
OURS = SpaceRecord("a" * 16, "fp32", DIMS, model="ours")
THEIRS = SpaceRecord("b" * 16, "fp32", DIMS, model="theirs")
CLAIM = """
import sys
sys.path.append(sys.argv[3])
from halimede.index import SpaceRecord, open_store
from halimede import SpaceRefused
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    print(store.claim(SpaceRecord(sys.argv[2], "fp32", 384)).space)
except SpaceRefused:
    print("refused")
"""


def row(result: Embeddings, number: int = 0) -> Embeddings:
    """One row of a result."""
    return dataclasses.replace(result, vectors=result.vectors[number : number + 1])


@pytest.fixture
def table(postgresql: str) -> Iterator[PgVector]:
    """An empty table `articles`."""
    made = PgVector(postgresql)
    made.connection.execute(
        "DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE EXTENSION vector"
    )
    made.create("articles")
    yield made
    made.connection.close()


def test_of_four_processes_one_space_wins(store: Collections, settings: Settings) -> None:
    """Processes that claim an empty collection for four spaces at once agree on one of them; where
    the store has no compare-and-set, all may be refused.
    """
    store.create("race")
    address = store.at("race")
    if address.startswith("qdrant:"):
        pytest.skip("a folder of Qdrant is of one process")
    chroma = str(next((settings.home / "test-packages").glob("chroma-*[0-9a-f]"), ""))
    spaces = [letter * 16 for letter in "abcd"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, address, space, chroma],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for space in spaces
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0].strip() for process in started]
    winners = {space for space in said if space != "refused"}
    assert len(winners) <= 1, said
    record = store.guard("race").record
    assert winners == (set() if record is None else {record.space})
    if not isinstance(store, Chroma):
        assert said.count("refused") == 0


# PostgreSQL


def test_every_role_reads_the_record(table: PgVector, result: Embeddings) -> None:
    """A role that may only select queries behind the guard; one that may only insert writes once
    the owner has recorded the space.
    """
    table.connection.execute(
        "DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN;"
        "GRANT USAGE ON SCHEMA public TO reader; GRANT SELECT, INSERT, UPDATE ON articles TO reader"
    )
    with psycopg.connect(table.uri, user="reader", autocommit=True) as connection:
        theirs = guard(connection, "articles")
        with pytest.raises(InvalidInput, match="owner"):
            theirs.write([1], row(result))
        assert theirs.store.count() == 0
        table.guard("articles").write([1], row(result), texts=["one"])
        theirs.write([2], row(result, 1), texts=["two"])
        [[best]] = theirs.query(row(result, 1), k=1)
        assert (best.id, best.text) == (2, "two")
        with pytest.raises(SpaceRefused):
            theirs.query(dataclasses.replace(row(result), space="0" * 16))


def test_a_transaction_of_the_user_is_respected(table: PgVector, result: Embeddings) -> None:
    """What the guard writes within it, the record too, is undone by a rollback, and seen by others
    after the commit. Without one, a write is committed.
    """
    with psycopg.connect(table.uri) as connection:
        docs = guard(connection, "articles")
        with pytest.raises(ZeroDivisionError), connection.transaction():
            docs.write([1], row(result))
            raise ZeroDivisionError
        assert (docs.record, docs.store.count()) == (None, 0)
        docs.write([1], row(result))
        assert table.guard("articles").store.count() == 1
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_snapshot_records_nothing(table: PgVector, result: Embeddings) -> None:
    """A transaction that cannot see other writers is refused as the first."""
    with psycopg.connect(table.uri) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        docs = guard(connection, "articles")
        with connection.transaction(), pytest.raises(InvalidInput, match="READ COMMITTED"):
            docs.write([1], row(result))


def test_the_record_is_of_the_column(table: PgVector, result: Embeddings) -> None:
    """It follows a rename, and is gone with the table: a table that takes the name has none."""
    table.guard("articles").write(IDS, result)
    table.connection.execute("ALTER TABLE articles RENAME TO renamed")
    table.create("articles")
    assert table.guard("renamed").record == SpaceRecord.of(result)
    assert table.guard("articles").record is None


@pytest.mark.parametrize(
    ("kind", "output_type"), [("halfvec(384)", "float16"), ("bit(384)", "ubinary")]
)
def test_other_types_of_pgvector(
    table: PgVector, real: Embedder, kind: str, output_type: Any
) -> None:
    """Half floats and bits are written, found and re-embedded."""
    table.connection.execute(f"CREATE TABLE small (id text PRIMARY KEY, text text, v {kind})")
    given = real.embed(TEXTS, output_type=output_type)
    docs = table.guard("small")
    docs.write([f"id {i}" for i in IDS], given, texts=TEXTS)
    for number, [best] in enumerate(docs.query(given, k=1)):
        assert best.id == f"id {IDS[number]}"
    with pytest.raises((SpaceRefused, InvalidInput)):
        docs.write(["x"], dataclasses.replace(row(given), output_type="binary"))
    if output_type == "float16":
        docs.adopt(real, replace=True)


def test_a_table_without_a_unique_id_takes_rows(table: PgVector, result: Embeddings) -> None:
    """Columns of other names, in another schema, are named by the caller."""
    table.connection.execute(
        "CREATE SCHEMA IF NOT EXISTS other;"
        'CREATE TABLE other."Docs" (key integer, body text, a vector(384), b vector(3))'
    )
    names = {"id_field": "key", "text_field": "body"}
    with psycopg.connect(table.uri, autocommit=True) as connection:
        with pytest.raises(InvalidInput, match="'a', 'b'"):
            guard(connection, "other.Docs", **names)
        docs = guard(connection, "other.Docs", **names, vector_field="a")
        docs.write(IDS, result, texts=TEXTS)
        [[best]] = docs.query(row(result, 3), k=1)
        assert (best.id, best.text) == (IDS[3], TEXTS[3])
        with pytest.raises(InvalidInput, match="no column 'colour'"):
            docs.write([1], row(result), fields=[{"colour": "red"}])
    table.connection.execute("DROP SCHEMA other CASCADE")


# FAISS


def test_a_replaced_index_has_no_valid_record(tmp_path: Path, result: Embeddings) -> None:
    """A file of other vectors that takes the index's place is refused, until it is adopted."""
    file = tmp_path / "vectors.faiss"
    docs = guard(file)
    docs.write(IDS, result)
    foreign = faiss.IndexIDMap2(faiss.IndexFlatIP(DIMS))
    vectors = np.random.default_rng(0).standard_normal((len(IDS), DIMS)).astype(np.float32)
    foreign.add_with_ids(vectors, np.array(IDS))
    faiss.write_index(foreign, str(file))
    for use in (lambda: guard(file).query(result), lambda: docs.write(IDS, result)):
        with pytest.raises(SpaceRefused, match="changed since"):
            use()
    docs.adopt(OURS, replace=True)
    assert guard(file).record == OURS


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_writer_killed_between_record_and_index_loses_nothing(
    tmp_path: Path, result: Embeddings, is_renamed: bool
) -> None:
    """The old file and the new one are both known while one replaces the other."""
    file = tmp_path / "vectors.faiss"
    docs = guard(file)
    docs.write(IDS, result)
    code = f"""
import os, pathlib, faiss
from halimede import guard
docs = guard({str(file)!r})
replace = pathlib.Path.replace
def replaced(path, target):
    if path.name.startswith(".vectors.faiss.") and not path.name.endswith(".json") \\
            and "halimede" not in path.name:
        {"replace(path, target)" if is_renamed else "pass"}
        os._exit(9)
    return replace(path, target)
pathlib.Path.replace = replaced
index = faiss.read_index({str(file)!r})
index.remove_ids(faiss.IDSelectorRange(1, 11))
docs.store.save(index)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    left = guard(file)
    assert left.record == SpaceRecord.of(result)
    assert left.store.count() == len(IDS) - 10 * is_renamed


def test_an_index_of_ones_own_is_saved_with_its_record(tmp_path: Path, result: Embeddings) -> None:
    """A trained index, written by the guard's store, is queried; without ids it takes no writes."""
    file = tmp_path / "vectors.faiss"
    own = faiss.index_factory(DIMS, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    own.train(result.vectors)
    own.add(result.vectors)
    docs = guard(str(file))
    with pytest.raises(InvalidInput, match="no record"):
        docs.store.save(own)  # type: ignore[attr-defined]
    docs.store.save(own, SpaceRecord.of(result))  # type: ignore[attr-defined]
    [[best]] = docs.query(row(result, 5), k=1)
    assert best.id == 5
    with pytest.raises(InvalidInput, match="IndexIDMap2"):
        docs.write([1], row(result))
    with pytest.raises(InvalidInput, match="in memory"):
        guard(own)
    (tmp_path / "text.faiss").write_text("no index")
    with pytest.raises(InvalidInput, match="no index of FAISS"):
        guard(tmp_path / "text.faiss").write([1], row(result))


def test_an_index_that_cannot_replace_rows_says_so(tmp_path: Path, result: Embeddings) -> None:
    """HNSW takes new ids, and refuses to replace those it has."""
    file = tmp_path / "vectors.faiss"
    docs = guard(file)
    docs.store.save(  # type: ignore[attr-defined]
        faiss.IndexIDMap2(faiss.IndexHNSWFlat(DIMS, 8)), SpaceRecord.of(result)
    )
    docs.write(IDS, result)
    with pytest.raises(InvalidInput, match="cannot replace"):
        docs.write([1], row(result))


# LanceDB


def test_a_table_that_others_have_changed_is_seen_at_a_write(
    tmp_path: Path, result: Embeddings, other: Embeddings
) -> None:
    """A table that was opened before another space was recorded refuses its write."""
    database = lancedb.connect(tmp_path)
    kind = pa.list_(pa.float32(), DIMS)
    schema = pa.schema([("id", pa.string()), ("vector", kind)])
    stale = guard(database.create_table("articles", schema=schema))
    assert stale.record is None
    guard(lancedb.connect(tmp_path).open_table("articles")).write(["1"], row(result))
    with pytest.raises(SpaceRefused):
        stale.write(["2"], row(other))
    assert stale.store.count() == 1


def test_bits_and_several_vectors_in_lancedb(tmp_path: Path, real: Embedder) -> None:
    """A column of bytes takes packed bits; of two columns one must be named, each has its record."""
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("text", pa.string()),
            ("bits", pa.list_(pa.uint8(), DIMS // 8)),
            ("floats", pa.list_(pa.float32(), DIMS)),
        ]
    )
    table = lancedb.connect(tmp_path).create_table("articles", schema=schema)
    with pytest.raises(InvalidInput, match="'bits', 'floats'"):
        guard(table)
    bits, floats = guard(table, vector_field="bits"), guard(table, vector_field="floats")
    packed, plain = real.embed(TEXTS, output_type="ubinary"), real.embed(TEXTS)
    both = [{"floats": vector} for vector in plain.vectors]
    bits.write(IDS, packed, texts=TEXTS, fields=both)
    assert floats.record is None
    assert bits.record == SpaceRecord.of(packed)
    assert [best.id for [best] in bits.query(packed, k=1)] == IDS
    with pytest.raises(SpaceRefused):
        bits.write(IDS, plain)
    with pytest.raises(InvalidInput, match="ubinary"):
        floats.adopt(packed)


# Qdrant


@pytest.fixture
def client(tmp_path: Path) -> Iterator[qdrant_client.QdrantClient]:
    """Qdrant in a folder."""
    made = qdrant_client.QdrantClient(path=str(tmp_path / "qdrant"))
    yield made
    made.close()


def test_each_named_vector_has_a_record(
    client: qdrant_client.QdrantClient,
    result: Embeddings,
    other: Embeddings,
    hashed: Embedder,
    tmp_path: Path,
) -> None:
    """Two vectors of a collection may be of two spaces; which one is meant must be said."""
    params = models.VectorParams(size=DIMS, distance=models.Distance.COSINE)
    client.create_collection("articles", {"title": params, "body": params})
    with pytest.raises(InvalidInput, match="'title', 'body'"):
        guard(client, "articles")
    title = guard(client, "articles", vector_field="title")
    title.write(IDS, result, texts=TEXTS)
    [[best]] = title.query(row(result, 2), k=1)
    assert (best.id, best.text) == (IDS[2], TEXTS[2])
    title.adopt(result)
    body = guard(client, "articles", vector_field="body")
    body.adopt(other)
    assert (title.record, body.record) == (SpaceRecord.of(result), SpaceRecord.of(other))
    with pytest.raises(InvalidInput, match="several vectors"):
        reembed(title.store, "anew", hashed, tmp_path / "work")


def test_of_two_claims_of_qdrant_the_second_is_withdrawn(
    client: qdrant_client.QdrantClient,
) -> None:
    """A claim that meets another between its read and its write is refused, and the first stays."""

    class Slow(qdrant_client.QdrantClient):
        """Another writer claims between a read and the write that follows it."""

        def update_collection(self, *given: Any, **named: Any) -> Any:
            if not named["metadata"].get("done"):
                key = f"halimede:{OURS.digest()}"
                client.update_collection("articles", metadata={key: OURS.to_json()})
            return client.update_collection(*given, **named)

    params = models.VectorParams(size=DIMS, distance=models.Distance.COSINE)
    client.create_collection("articles", params)
    slow = Slow(":memory:")
    slow._client = client._client
    with pytest.raises(SpaceRefused, match="at the same time"):
        guard(slow, "articles").store.claim(THEIRS)
    assert guard(client, "articles").record == OURS


def test_payload_indexes_and_ids_are_kept(
    client: qdrant_client.QdrantClient, result: Embeddings, hashed: Embedder, tmp_path: Path
) -> None:
    """UUIDs stay UUIDs, and texts of another payload key stay there."""
    params = models.VectorParams(size=DIMS, distance=models.Distance.DOT)
    client.create_collection("articles", params)
    ids = [f"00000000-0000-0000-0000-{i:012d}" for i in IDS]
    docs = guard(client, "articles", text_field="page_content")
    docs.write(ids, result, texts=TEXTS)
    reembed(docs.store, "anew", hashed, tmp_path / "work")
    [point] = client.retrieve("anew", [ids[4]])
    assert point.payload == {"page_content": TEXTS[4]}
    assert client.get_collection("anew").config.params.vectors.distance == models.Distance.DOT


# Chroma


def test_a_claim_that_a_killed_writer_left(
    tmp_path: Path, settings: Settings, result: Embeddings, other: Embeddings
) -> None:
    """It holds for its own space, refuses another, and goes with the record."""
    store = Chroma(tmp_path, import_chroma(settings.home / "test-packages"))
    store.create("articles")
    collection = store.client.get_collection("articles", embedding_function=None)
    claim = f"halimede-claim-{collection.id}"
    record = SpaceRecord.of(result).to_json()
    store.client.create_collection(claim, metadata={"halimede": record}, embedding_function=None)
    with pytest.raises(SpaceRefused, match="at the same time"):
        store.guard("articles").write(["1"], row(other))
    store.guard("articles").write(["1"], row(result))
    assert [one.name for one in store.client.list_collections()] == ["articles"]
    [[best]] = store.guard("articles").query(row(result), k=1)
    assert best.score == pytest.approx(0, abs=1e-5)  # cosine: hnsw:space is kept


# Records and addresses


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "damaged"),
        ("[]", "damaged"),
        ("no JSON", "damaged"),
        (json.dumps({"format": FORMAT, "space": 1, "precision": "fp32", "dims": 3}), "damaged"),
        (json.dumps({"format": FORMAT, "space": "s", "precision": "fp32"}), "damaged"),
        (json.dumps({"format": FORMAT + 1, "anything": "else"}), "Update"),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error(text: str, reason: str) -> None:
    """Damaged, or of a later version: neither is taken for none."""
    with pytest.raises(InvalidInput, match=reason):
        SpaceRecord.from_json(text, "it")
    assert SpaceRecord.from_json(OURS.to_json(), "it") == OURS


@pytest.mark.parametrize(
    "address",
    [
        "elsewhere:data#articles",
        "qdrant:data",
        "lancedb:no-such-folder#articles",
        "qdrant:no-such-folder#articles",
        "chroma:#articles",
        "faiss:no-such-folder/vectors.faiss",
    ],
)
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    """With what is wrong, before anything is made."""
    os.chdir(tmp_path)
    with pytest.raises(InvalidInput):
        open_store(address)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_collection_is_refused(
    tmp_path: Path, client: qdrant_client.QdrantClient, table: PgVector
) -> None:
    """Other objects, clients without a name, names that are not there, unknown options."""
    database = lancedb.connect(tmp_path)
    for given in (
        (object(),),
        (client,),
        (client, "nothing"),
        (table.connection,),
        (table.connection, "nothing"),
        (database,),
        (qdrant_client.AsyncQdrantClient(":memory:"), "articles"),
    ):
        with pytest.raises(InvalidInput):
            guard(*given)
    with pytest.raises(InvalidInput, match="id_field"):
        guard(tmp_path / "vectors.faiss", id_field="id")


def test_a_client_that_is_not_installed_is_named(tmp_path: Path) -> None:
    """The error says which extra brings it."""
    code = (
        "import sys; sys.modules['faiss'] = None; from halimede import guard, MissingExtra\n"
        f"try: guard({str(tmp_path / 'x.faiss')!r})\n"
        "except MissingExtra as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "halimede[index-faiss]" in done.stdout
    assert issubclass(MissingExtra, ImportError)
    assert SUFFIX.endswith(".json")
