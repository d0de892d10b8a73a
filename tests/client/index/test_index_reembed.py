"""A collection into another space: the plan, its steps, and the guard after."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from index_stores import TEXTS, Collections
from typer.testing import CliRunner

from halimede import Embedder, Embeddings, InvalidInput, SpaceRefused
from halimede.bulk import BulkOptions, run
from halimede.cli import app
from halimede.index import Price, SpaceRecord, export, load, plan, reembed
from halimede_tools.settings import Settings

pytest_plugins = ("index_fixtures",)
IDS = list(range(1, len(TEXTS) + 1))
FIELDS: dict[str, list[dict[str, Any]]] = {
    "Qdrant": [{"n": i, "tags": ["a", {"b": None}], "price": 0.1} for i in IDS],
    "Chroma": [{"n": i, "price": 0.1, "is_new": True} for i in IDS],
    "LanceDB": [{"n": i, "at": datetime.datetime(2026, 1, 1, 12, 0, 0, i)} for i in IDS],
    "PgVector": [
        {
            "n": i,
            "at": datetime.datetime(2026, 1, 1, 12, 0, 0, i, datetime.UTC),
            "price": decimal.Decimal(f"{i}.10000000000000000001"),
        }
        for i in IDS
    ],
}


def filled(store: Collections, result: Embeddings, name: str = "articles") -> None:
    """A guarded collection with texts and fields of every type that the store has."""
    store.create(name)
    more = {"texts": TEXTS, "fields": FIELDS[type(store).__name__]} if store.keeps_texts else {}
    store.guard(name).write(IDS, result, **more)


def texts_of(store: Collections, folder: Path) -> tuple[str, ...]:
    """A file with the texts, of a store that keeps none."""
    if store.keeps_texts:
        return ()
    file = folder / "texts.jsonl"
    rows = [{"id": i, "text": text} for i, text in zip(IDS, TEXTS, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return (str(file),)


def new_name(store: Collections, name: str) -> str:
    """A name as `created` takes it: of FAISS a path."""
    return name if store.keeps_texts else str(store.guard(name).store._path)  # type: ignore[attr-defined]


def test_the_plan_re_embeds_and_the_guard_agrees(
    store: Collections,
    real: Embedder,
    hashed: Embedder,
    result: Embeddings,
    other: Embeddings,
    tmp_path: Path,
) -> None:
    """The new collection has all rows with texts, fields and metadata, takes the new space and
    refuses the old one; the old collection is as it was. A second run does nothing again.
    """
    filled(store, result)
    texts = texts_of(store, tmp_path)
    old = store.guard("articles")
    made = plan(old.store, hashed, texts=texts)
    assert (made.rows, made.sampled, made.is_needed) == (len(TEXTS), len(TEXTS), True)
    assert (made.record, made.target) == (SpaceRecord.of(result), SpaceRecord.of(other))
    assert made.seconds == pytest.approx(made.rows / made.texts_per_s, abs=0.2)
    for _ in range(2):
        done = reembed(old.store, new_name(store, "anew"), hashed, tmp_path / "work", texts=texts)
        assert (done.rows, done.left_out) == (len(TEXTS), 0)
    new = store.guard("anew")
    assert new.record == SpaceRecord.of(other) == done.record
    new.check(hashed)
    with pytest.raises(SpaceRefused):
        new.query(result)
    with pytest.raises(SpaceRefused):
        new.write(IDS, result)
    for row, matches in enumerate(new.query(other, k=1)):
        assert int(matches[0].id) == IDS[row]
        if store.keeps_texts:
            fields = FIELDS[type(store).__name__][row]
            assert matches[0].text == TEXTS[row]
            assert {key: matches[0].fields[key] for key in fields} == fields
    assert store.own_metadata("anew") == store.mine
    assert store.guard("articles").record == SpaceRecord.of(result)
    assert len(store.guard("articles").query(result, k=1)) == len(TEXTS)
    with pytest.raises(SpaceRefused):
        store.guard("articles").query(other)


def test_the_new_collection_goes_on(
    store: Collections, hashed: Embedder, result: Embeddings, tmp_path: Path
) -> None:
    """Rows are written into it as into the old one, an identity column after the last id too."""
    filled(store, result)
    texts = texts_of(store, tmp_path)
    reembed(
        store.guard("articles").store,
        new_name(store, "anew"),
        hashed,
        tmp_path / "work",
        texts=texts,
    )
    new = store.guard("anew")
    more = {"texts": ["one more"]} if store.keeps_texts else {}
    new.write([1000], hashed.embed("one more"), **more)
    assert new.store.count() == len(TEXTS) + 1
    if type(store).__name__ == "PgVector":
        store.connection.execute("INSERT INTO anew (text) VALUES ('native')")  # type: ignore[attr-defined]


def test_an_ended_load_is_run_again(store: Collections, hashed: Embedder, tmp_path: Path) -> None:
    """A load that ends between two writes is completed by the next, with every row once; PostgreSQL
    and FAISS keep nothing of the first.
    """
    filled(store, hashed.embed(TEXTS))
    source = tmp_path / "texts.jsonl"
    rows = [{"id": i, "text": t, "fields": "{}"} for i, t in zip(IDS, TEXTS, strict=True)]
    source.write_text("\n".join(map(json.dumps, rows)))
    options = BulkOptions(id_column="id", keep=("text", "fields"))
    run(hashed, [str(source)], str(tmp_path / "out"), options)

    def end(rows: int) -> None:
        raise InterruptedError

    old = store.guard("articles").store
    name = new_name(store, "anew")
    with pytest.raises(InterruptedError):
        load(old, name, str(tmp_path / "out"), rows_per_write=16, on_rows=end)
    done = load(old, name, str(tmp_path / "out"))
    assert done.rows == store.guard("anew").store.count() == len(IDS)


def test_the_time_and_the_cost_follow_from_the_measured_rate(
    store: Collections, real: Embedder, hashed: Embedder, result: Embeddings, tmp_path: Path
) -> None:
    """Tokens are those of the sample for all rows; a price of tokens needs a model that counts
    them.
    """
    filled(store, result)
    texts = texts_of(store, tmp_path)
    collection = store.guard("articles").store
    price = Price(per_hour=3600.0, per_million_tokens=1e6)
    made = plan(collection, real, texts=texts, price=price)
    assert made.tokens == int(real.embed(TEXTS).tokens.sum())
    assert made.cost == pytest.approx(made.rows / made.texts_per_s + made.tokens, rel=0.01)
    assert not made.is_needed
    with pytest.raises(InvalidInput, match="does not count"):
        plan(collection, hashed, texts=texts, price=Price(per_million_tokens=1.0))


def test_commands_from_plan_to_load(
    store: Collections, settings: Settings, result: Embeddings, tmp_path: Path
) -> None:
    """`check` agrees with the old model and not with the new one; `plan --export`, `bulk` and
    `load` make a collection with which the new one agrees; `reembed` does all in one.
    """
    filled(store, result)
    old = store.at("articles")
    config = tmp_path / "halimede.yaml"
    local = {"provider": "onnx", "model_id": result.model, "path": str(settings.repository)}
    hashed = {"provider": "hash", "model_id": "hashed"}
    config.write_text(yaml.safe_dump({"models": {"old": local, "new": hashed}}))
    runner = CliRunner()

    def halimede(*words: str, model: str = "new", code: int = 0) -> dict[str, Any]:
        given = [*words, "--config", str(config), "--model", model, "--json"]
        if words[:2] == ("index", "load"):
            given = [*words, "--json"]
        done = runner.invoke(app, given)
        assert done.exit_code == code, (done.output, done.exception)
        return json.loads(done.stdout)

    texts = texts_of(store, tmp_path)
    into = new_name(store, "anew") if not store.keeps_texts else "anew"
    assert halimede("index", "check", old, model="old")["agrees"] is True
    refused = halimede("index", "check", old, code=1)
    assert refused["space"] == result.space
    assert "anew" not in refused["reason"]
    words = [part for file in texts for part in ("--texts", file)]
    if store.keeps_texts:
        words += ["--export", str(tmp_path / "texts")]
    planned = halimede("index", "plan", old, *words, "--price-per-hour", "1.0")
    assert planned["rows"] == len(TEXTS)
    source = texts[0] if texts else str(tmp_path / "texts")
    keep = ("--keep", "text,fields") if store.keeps_texts else ()
    out = str(tmp_path / "out")
    halimede("bulk", source, "--out", out, "--id-column", "id", *keep)
    assert halimede("index", "load", out, old, "--into", into)["rows"] == len(TEXTS)
    new = old.replace("articles", "anew")
    assert halimede("index", "check", new)["agrees"] is True
    assert halimede("index", "check", new, model="old", code=1)["agrees"] is False
    words = [part for file in texts for part in ("--texts", file)]
    work = ("--work", str(tmp_path / "work"))
    again = into.replace("anew", "again")
    done = halimede("index", "reembed", old, "--into", again, *work, *words)
    assert done["rows"] == len(TEXTS)
    with_unknown = runner.invoke(app, ["index", "check", old.replace("articles", "nothing/at")])
    assert with_unknown.exit_code == 1
    assert isinstance(with_unknown.exception, (InvalidInput, SystemExit))


def test_adopt_on_the_command_line(
    store: Collections, settings: Settings, result: Embeddings, tmp_path: Path
) -> None:
    """The model that made the vectors is accepted, another refused unless it is believed."""
    store.create("articles")
    store.fill("articles", IDS, result.vectors, TEXTS)
    address = store.at("articles")
    config = tmp_path / "halimede.yaml"
    local = {"provider": "onnx", "model_id": result.model, "path": str(settings.repository)}
    hashed = {"provider": "hash", "model_id": "hashed"}
    config.write_text(yaml.safe_dump({"models": {"old": local, "new": hashed}}))
    words = ["--config", str(config), "--json"]
    runner = CliRunner()
    believed = [] if store.keeps_texts else ["--unverified"]
    if store.keeps_texts:
        refused = runner.invoke(app, ["index", "adopt", address, *words, "--model", "new"])
        assert isinstance(refused.exception, SpaceRefused)
    done = runner.invoke(app, ["index", "adopt", address, *believed, *words, "--model", "old"])
    assert json.loads(done.stdout)["space"] == result.space
    replaced = ["--unverified", "--replace", *words, "--model", "new"]
    done = runner.invoke(app, ["index", "adopt", address, *replaced])
    assert json.loads(done.stdout)["model"] == "hashed"


def test_rows_without_a_text_are_counted(
    store: Collections, result: Embeddings, tmp_path: Path
) -> None:
    """An export of them is refused, with their number, and leaves no whole folder."""
    if not store.keeps_texts:
        with pytest.raises(InvalidInput, match="--texts"):
            export(store.guard("articles").store, tmp_path / "texts")
        return
    store.create("articles")
    texts = [None, "", *TEXTS[2:]]
    store.guard("articles").write(IDS, result, texts=texts)
    with pytest.raises(InvalidInput, match=f"2 of {len(IDS)} rows without a text"):
        export(store.guard("articles").store, tmp_path / "texts")
    with pytest.raises(InvalidInput, match="2 of"):
        export(store.guard("articles").store, tmp_path / "texts")


def test_an_export_is_of_one_state_of_one_collection(
    store: Collections, result: Embeddings, tmp_path: Path
) -> None:
    """A folder that has the texts of another collection, or of fewer rows, is refused."""
    if not store.keeps_texts:
        pytest.skip("it has no texts to export")
    filled(store, result)
    filled(store, result, "others")
    folder = tmp_path / "texts"
    assert export(store.guard("articles").store, folder).rows == len(TEXTS)
    with pytest.raises(InvalidInput, match="articles"):
        export(store.guard("others").store, folder)
    one = dataclasses.replace(result, vectors=result.vectors[:1])
    store.guard("articles").write([999], one, texts=["one more"])
    with pytest.raises(InvalidInput, match=f"{len(TEXTS) + 1} now"):
        export(store.guard("articles").store, folder)


def test_a_job_that_is_not_finished_is_not_loaded(
    store: Collections, hashed: Embedder, result: Embeddings, tmp_path: Path
) -> None:
    """Nor one without ids, nor what is no job."""
    filled(store, result)
    old = store.guard("articles").store
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"id": i, "text": "t"}) for i in IDS))
    for out, options, reason in (
        ("noid", BulkOptions(), "--id-column"),
        ("half", BulkOptions(id_column="id", rows_per_file=20), "lacks 1 of 2"),
    ):
        run(hashed, [str(source)], str(tmp_path / out), options)
        if out == "half":
            manifest = tmp_path / out / "_manifest.json"
            facts = json.loads(manifest.read_text())
            facts["files"].popitem()
            manifest.write_text(json.dumps(facts))
        with pytest.raises(InvalidInput, match=reason):
            load(old, new_name(store, "anew"), str(tmp_path / out))
    with pytest.raises(InvalidInput, match="no job"):
        load(old, new_name(store, "anew"), str(tmp_path / "nothing"))
