"""Datasets through an embedder: formats, columns, errors, resumption."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import strategies
from PIL import Image

from halimede import Embedder, InvalidInput, ServerUnreachable, SpaceRefused
from halimede.bulk import BulkOptions, Done, Manifest, Shard, run
from halimede.bulk import embedding as embeddings
from halimede.bulk.manifest import read_manifest
from halimede.bulk.rows import open_rows
from halimede.bulk.storage import place
from halimede.testing import FakeProvider

HASH = {"models": {"hashed": {"provider": "hash", "model_id": "hashed"}}}
WORDS = ["river", "Größe", "звезда", 'a "quote"', "com,ma", "tab\tbed", "two\nlines", "🙂", ""]


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows with every character that a format has to quote."""
    return [
        {"id": f"{i:05d}", "text": f"{WORDS[i % len(WORDS)]} {i}", "n": i, "tags": [i, None]}
        for i in range(count)
    ]


def one_line(text: str) -> str:
    return text.replace("\n", " ")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the file's name."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
        return path
    out = io.StringIO()
    if kind == "jsonl":
        out.writelines(json.dumps(row) + "\n" for row in rows)
    elif kind == "txt":
        out.writelines(f"{one_line(row['text'])}\n" for row in rows)
    else:
        writer = csv.DictWriter(
            out, ["id", "text", "n", "tags"], delimiter="\t" if kind == "tsv" else ","
        )
        writer.writeheader()
        writer.writerows(rows)
    data = out.getvalue().encode()
    pack = {"gz": gzip.compress, "bz2": bz2.compress}.get(path.suffix[1:], bytes)
    path.write_bytes(pack(data))
    return path


def vectors_of(table: pa.Table, column: str = "vector") -> np.ndarray:
    array = table.column(column).combine_chunks()
    return array.flatten().to_numpy().reshape(len(array), -1)


@pytest.fixture
def hashing() -> Embedder:
    with Embedder(config=HASH) as embedder:
        yield embedder


@pytest.mark.parametrize(
    "name",
    ["a.parquet", "a.jsonl", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.csv.bz2", "a.txt.gz"],
)
def test_every_format_gives_the_vectors_of_embed(
    name: str, hashing: Embedder, tmp_path: Path
) -> None:
    """Row for row, whatever a text holds and wherever a file of the output ends."""
    rows = rows_of(250)
    source = write(tmp_path / name, rows)
    is_text = name.split(".")[1] == "txt"
    options = (
        BulkOptions(rows_per_file=40)
        if is_text
        else BulkOptions(rows_per_file=40, id_column="id", keep=("n",))
    )
    manifest = run(hashing, [str(source)], str(tmp_path / "out"), options)
    table = pq.read_table(tmp_path / "out")
    texts = [one_line(row["text"]) if is_text else row["text"] for row in rows]
    assert np.array_equal(vectors_of(table), hashing.embed(texts).vectors)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 384)
    if is_text:
        assert table.column("row").to_pylist() == list(range(250))
    else:
        assert table.column("id").to_pylist() == [row["id"] for row in rows]
        kept = table.column("n").to_pylist()
        assert kept == [str(row["n"]) if "sv" in name else row["n"] for row in rows]
    assert len(manifest.files) == len(list((tmp_path / "out").glob("*.parquet"))) == 7


def test_columns_of_json_have_one_type_in_all_files(hashing: Embedder, tmp_path: Path) -> None:
    """Whole numbers and decimals become decimals; values of no common type are kept as JSON."""
    rows = [
        {"text": "a", "n": 1, "mixed": 1, "late": None},
        {"text": "b", "n": 1.5, "mixed": {"x": [1]}, "late": None},
        {"text": "c", "mixed": "s", "late": {"y": 2}},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    run(hashing, [str(source)], str(tmp_path / "out"), BulkOptions(keep=("*",), rows_per_file=1))
    table = pq.read_table(tmp_path / "out")
    assert table.column("n").to_pylist() == [1.0, 1.5, None]
    assert table.column("mixed").to_pylist() == ["1", '{"x": [1]}', "s"]
    assert table.column("late").to_pylist() == [None, None, {"y": 2}]
    assert table.column("text").to_pylist() == ["a", "b", "c"]


@hypothesis.given(
    rows=strategies.lists(
        strategies.lists(strategies.text(max_size=8), min_size=2, max_size=2), max_size=20
    ),
    rows_per_file=strategies.integers(1, 5),
    end=strategies.sampled_from(["\n", "\r\n"]),
)
def test_csv_is_cut_where_rows_end(
    rows: list[list[str]], rows_per_file: int, end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The parts of a file have the rows that Python's csv has, in any cut."""
    rows = [
        [a.replace("\r", "").replace("\0", ""), b.replace("\r", "").replace("\0", "")]
        for a, b in rows
    ]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file, lineterminator=end).writerows([["x", "y"], *rows])
    try:
        path.read_text()
    except UnicodeDecodeError:
        hypothesis.assume(False)
    source = open_rows(place(str(path)))
    schema = pa.schema([("x", pa.string()), ("y", pa.string())])
    parts = list(source.parts(rows_per_file, 1 << 20))
    read = [source.read(part, schema) for part in parts]
    assert all(part.rows == len(one.table) for part, one in zip(parts, read, strict=True))
    assert [list(r.values()) for one in read for r in one.table.to_pylist()] == rows
    assert not any(one.damaged for one in read)


@pytest.mark.parametrize(
    ("output_type", "value", "width"),
    [
        ("float16", pa.float16(), 384),
        ("int8", pa.int8(), 384),
        ("uint8", pa.uint8(), 384),
        ("binary", pa.int8(), 48),
        ("ubinary", pa.uint8(), 48),
    ],
)
def test_output_types(
    output_type: str, value: pa.DataType, width: int, hashing: Embedder, tmp_path: Path
) -> None:
    """Each has Arrow's type of it, and the values of `embed`."""
    texts = [row["text"] for row in rows_of(20)]
    source = write(tmp_path / "a.jsonl", rows_of(20))
    ranges = np.array([[-0.2] * 384, [0.2] * 384], np.float32) if "int8" in output_type else None
    given = {} if ranges is None else {"ranges": ranges.tolist()}
    run(
        hashing, [str(source)], str(tmp_path / "out"), BulkOptions(output_type=output_type, **given)
    )
    table = pq.read_table(tmp_path / "out")
    assert table.schema.field("vector").type == pa.list_(value, width)
    expected = hashing.embed(texts, output_type=output_type, ranges=ranges).vectors
    assert np.array_equal(vectors_of(table), expected)


DAMAGED = {
    "no text": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": null}\n{"text": "too"}\n',
        "row 1 has noth",
    ),
    "no key": (
        "a.jsonl",
        b'{"text": "fine"}\n{"txt": "SECRET"}\n{"text": "too"}\n',
        "row 1 has not",
    ),
    "a number": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": 17}\n{"text": "too"}\n',
        "text is int, no",
    ),
    "no JSON": ("a.jsonl", b'{"text": "fine"}\n{"text: SECRET\n{"text": "too"}\n', "is not a JSON"),
    "no object": (
        "a.jsonl",
        b'{"text": "fine"}\n["SECRET"]\n{"text": "too"}\n',
        "is not a JSON ob",
    ),
    "half a pair": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": "\\ud83d"}\n{"text": "too"}\n',
        "half of",
    ),
    "not UTF-8": ("a.txt", b"fine\nSECRET\xff\ntoo\n", "row 1 is not UTF-8"),
    "fields": ("a.csv", b"text,n\nfine,1\nSECRET\ntoo,2\n", "row 1 has 1 fields; the header has 2"),
    "not UTF-8 in CSV": ("a.csv", b"text,n\nfine,1\nSECRET\xff,1\ntoo,2\n", "row 1 is not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_row_that_fails_ends_the_job_or_gets_an_error(
    case: str, hashing: Embedder, tmp_path: Path
) -> None:
    """The error names the row and not the text; with `collect` the other rows have vectors."""
    name, data, message = DAMAGED[case]
    source = tmp_path / name
    source.write_bytes(data)
    with pytest.raises(InvalidInput, match="row 1") as raised:
        run(hashing, [str(source)], str(tmp_path / "raised"))
    assert "SECRET" not in str(raised.value)
    run(hashing, [str(source)], str(tmp_path / "out"), BulkOptions(errors="collect"))
    table = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["error"] is None for row in table] == [True, False, True]
    assert message in table[1]["error"]
    assert "SECRET" not in table[1]["error"]
    assert table[1]["vector"] is None and table[1]["tokens"] is None
    assert np.allclose(table[2]["vector"], hashing.embed("too").vectors[0])


def test_an_error_of_the_model_is_about_its_row(tmp_path: Path) -> None:
    """A text that the model refuses is named by its row in the source, also in a later window."""
    source = tmp_path / "a.jsonl"
    texts = ["fine"] * 5000 + ["not finite"] + ["fine"] * 10
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    nan = FakeProvider(vectors={"not finite": [float("nan")] * 384})
    with Embedder(providers=[nan]) as embedder:
        with pytest.raises(Exception, match="5000 has no vector"):
            run(embedder, [str(source)], str(tmp_path / "raised"))
        options = BulkOptions(errors="collect")
        manifest = run(embedder, [str(source)], str(tmp_path / "out"), options)
    table = pq.read_table(tmp_path / "out")
    assert sum(file.errors for file in manifest.files.values()) == 1
    assert table.column("error").to_pylist()[5000].startswith("input 5000 has no vector")
    assert table.column("vector").null_count == 1


def test_only_what_is_missing_is_done_again(tmp_path: Path) -> None:
    """A deleted, a shortened and an unfinished file are written again, and no other."""
    source = write(tmp_path / "a.parquet", rows_of(200))
    out = tmp_path / "out"
    fake = FakeProvider()
    with Embedder(providers=[fake]) as embedder:
        options = BulkOptions(rows_per_file=50)
        run(embedder, [str(source)], str(out), options)
        expected = pq.read_table(out)
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        (out / "00000-000001.parquet").unlink()
        (out / "00000-000002.parquet").write_bytes(b"PAR1")
        (out / ".00000-000001.parquet.abcd").write_bytes(b"half")
        asked = sum(len(request.inputs) for request in fake.requests)
        seen: list[Done] = []
        run(embedder, [str(source)], str(out), options, on_progress=seen.append)
    assert sum(len(request.inputs) for request in fake.requests) - asked == 100
    assert (seen[0], seen[-1]) == (Done(100, 200), Done(200, 200))
    assert pq.read_table(out).equals(expected)
    same = [n for n, t in times.items() if (out / n).stat().st_mtime_ns == t]
    assert sorted(same) == ["00000-000000.parquet", "00000-000003.parquet"]
    assert not [path for path in out.iterdir() if path.name.startswith(".0")]


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    """Killed ten times at random moments, the output is that of an undisturbed run."""
    source = write(tmp_path / "a.jsonl", rows_of(60_000))
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(HASH))
    command = [str(Path(sys.executable).parent / "halimede"), "bulk", str(source), "--config"]
    command += [str(config), "--rows-per-file", "1500", "--id-column", "id", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, cwd=ROOT)
    out, chance = tmp_path / "out", random.Random(7)
    kills = 0
    while kills < 10:
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, cwd=ROOT)
        time.sleep(chance.uniform(0.6, 1.1))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    subprocess.run([*command, str(out)], check=True, capture_output=True, cwd=ROOT)
    assert kills >= 5
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole"))
    names = [path.name for path in out.iterdir() if not path.name.startswith(".1-of")]
    assert sorted(names) == sorted(
        [*(f"00000-{i:06d}.parquet" for i in range(40)), "_manifest.json"]
    )


def test_a_job_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    """Another space, precision, length, option or source, and a folder with other files."""
    source, other = (
        write(tmp_path / "a.jsonl", rows_of(10)),
        write(tmp_path / "b.jsonl", rows_of(9)),
    )
    out = str(tmp_path / "out")
    fakes = [FakeProvider(), FakeProvider(space="other"), FakeProvider(precision="int8")]
    same, another, eight = (Embedder(providers=[fake]) for fake in fakes)
    run(same, [str(source)], out)
    for embedder, fact in ((another, "space fake"), (eight, "precision fp32")):
        with pytest.raises(SpaceRefused, match=fact):
            run(embedder, [str(source)], out)
    with pytest.raises(SpaceRefused, match="dims 384"):
        run(same, [str(source)], out, BulkOptions(dimensions=128))
    with pytest.raises(InvalidInput, match="keep"):
        run(same, [str(source)], out, BulkOptions(keep=("n",)))
    with pytest.raises(InvalidInput, match="other sources"):
        run(same, [str(other)], out)
    source.write_text(source.read_text().replace("river", "RIVER"))
    with pytest.raises(InvalidInput, match="has changed since"):
        run(same, [str(source)], out)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInput, match="files of no job"):
        run(same, [str(other)], str(tmp_path))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"text_column": "txt"}, "has no column 'txt'; it has 'id', 'text', 'n', 'tags'"),
        ({"text_column": "n"}, "column 'n' of .* is int64; give a column of strings"),
        ({"id_column": "nr"}, "has no column 'nr'"),
        ({"keep": ("vector",)}, "has no column 'vector'"),
        ({"late": True}, "give --chunk"),
        ({"chunk_tokens": 10, "image_column": "text"}, "--chunk is for texts"),
        ({"output_type": "int8"}, "needs --ranges"),
    ],
)
def test_options_that_cannot_be_met(
    given: dict[str, Any], error: str, hashing: Embedder, tmp_path: Path
) -> None:
    """One error before any work; the columns that there are are named."""
    source = write(tmp_path / "a.parquet", rows_of(10))
    with pytest.raises(InvalidInput, match=error):
        run(hashing, [str(source)], str(tmp_path / "out"), BulkOptions(**given))
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize(
    ("sources", "error"),
    [
        ([], "no SOURCE"),
        (["missing.csv"], "does not exist"),
        (["a.jsonl", "a.jsonl"], "given twice"),
        (["a.xlsx"], "does not end with .parquet"),
        (["folder"], "has no file"),
        (["broken.parquet"], "is not Parquet"),
        (["nope://bucket/x.csv"], "nope:// is not a protocol"),
        (["other.jsonl", "a.jsonl"], "has no column 'text'"),
        (["twice.csv"], "has the column 'text' twice"),
    ],
)
def test_sources_that_cannot_be_read(
    sources: list[str], error: str, hashing: Embedder, tmp_path: Path
) -> None:
    """A typed error says which and why."""
    write(tmp_path / "a.jsonl", rows_of(3))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "other.jsonl").write_text('{"txt": 1}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "twice.csv").write_text("text,text\n1,2\n")
    paths = [s if "://" in s else str(tmp_path / s) for s in sources]
    with pytest.raises(InvalidInput, match=error):
        run(hashing, paths, str(tmp_path / "out"))


def test_an_empty_source_has_no_files(hashing: Embedder, tmp_path: Path) -> None:
    """An empty file of each format: the job is done, and the manifest says so."""
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.csv").write_text("text\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    sources = [str(tmp_path / name) for name in ("a.txt", "b.csv", "c.parquet")]
    manifest = run(hashing, sources, str(tmp_path / "out"))
    assert ([s.rows for s in manifest.sources], manifest.files) == ([0, 0, 0], {})


def test_equal_texts_are_embedded_once(tmp_path: Path) -> None:
    """In a window, in another window, in another file, and after a run that was ended."""
    chance = random.Random(1)
    texts = [f"text {chance.randrange(700)}" for _ in range(9000)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fake, out = FakeProvider(), tmp_path / "out"
    options = BulkOptions(rows_per_file=5000)
    with Embedder(providers=[fake]) as embedder:
        run(embedder, [str(source)], str(out), options, dedupe=True)
    asked = Counter(text for request in fake.requests for text in request.inputs)
    assert asked == Counter({text.encode(): 1 for text in set(texts)})
    with Embedder(providers=[FakeProvider()]) as embedder:
        expected = embedder.embed(texts).vectors
    assert np.array_equal(vectors_of(pq.read_table(out)), expected)
    assert not list(out.glob("*.sqlite*"))


def test_a_text_that_fails_fails_wherever_it_is(tmp_path: Path) -> None:
    """With --dedupe, each row with the text gets the error, and the others their vectors."""
    source = tmp_path / "a.jsonl"
    texts = ["bad" if i % 3 == 0 else f"text {i % 50}" for i in range(6000)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    nan = FakeProvider(vectors={"bad": [float("nan")] * 384})
    with Embedder(providers=[nan]) as embedder:
        options = BulkOptions(errors="collect", rows_per_file=5000)
        run(embedder, [str(source)], str(tmp_path / "out"), options, dedupe=True)
    table = pq.read_table(tmp_path / "out")
    assert [e is not None for e in table["error"].to_pylist()] == [t == "bad" for t in texts]
    assert [v is None for v in table["vector"].to_pylist()] == [t == "bad" for t in texts]


def test_images_and_pairs(hashing: Embedder, tmp_path: Path) -> None:
    """Bytes, paths and the structs of Hugging Face's datasets; with texts, pairs of both."""
    images = []
    for number, colour in enumerate(("red", "grey", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{number}.png")
        images.append((tmp_path / f"{number}.png").read_bytes())
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    structs = [{"bytes": images[0], "path": None}, {"bytes": None, "path": paths[1]}, None]
    table = pa.table({"data": images, "path": paths, "struct": structs, "text": ["a", "b", None]})
    pq.write_table(table, tmp_path / "a.parquet")

    def embedded(column: str, **given: Any) -> list[dict[str, Any]]:
        options = BulkOptions(image_column=column, errors="collect", **given)
        out = str(tmp_path / f"{column}{len(given)}")
        run(hashing, [str(tmp_path / "a.parquet")], out, options)
        return pq.read_table(out).to_pylist()

    expected = hashing.embed_images(images).vectors
    for column in ("data", "path"):
        assert np.allclose([row["vector"] for row in embedded(column)], expected)
    rows = embedded("struct")
    assert np.allclose([row["vector"] for row in rows[:2]], expected[:2])
    assert rows[2]["vector"] is None and "nothing to embed" in rows[2]["error"]
    pairs = embedded("data", text_column="text")
    expected = hashing.embed_multimodal(["a", "b", None], images).vectors
    assert np.allclose([row["vector"] for row in pairs], expected)


def test_an_image_that_fails_gets_an_error(hashing: Embedder, tmp_path: Path) -> None:
    """A path without a file: the other rows have vectors, and the error names no path."""
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    rows = [{"image": str(tmp_path / "fine.png")}, {"image": str(tmp_path / "SECRET.png")}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = BulkOptions(image_column="image", errors="collect")
    run(hashing, [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), options)
    fine, failed = pq.read_table(tmp_path / "out").to_pylist()
    assert fine["error"] is None and len(fine["vector"]) == 384
    assert failed["vector"] is None and "SECRET" not in failed["error"]


def test_processes_share_a_job(hashing: Embedder, tmp_path: Path) -> None:
    """--shard 1/3, 2/3 and 3/3: every row once, and one manifest of all."""
    source = write(tmp_path / "a.csv", rows_of(100))
    out = str(tmp_path / "out")
    options = BulkOptions(rows_per_file=9, id_column="id")
    for number in (3, 1, 2):
        run(hashing, [str(source)], out, options, shard=Shard(number, 3))
    ids = pq.read_table(out).column("id").to_pylist()
    assert ids == [row["id"] for row in rows_of(100)]
    manifest = read_manifest(place(out))
    assert manifest is not None
    assert sum(file.rows for file in manifest.files.values()) == 100
    # Another number of processes finds nothing left to do.
    assert len(run(hashing, [str(source)], out, options).files) == 12


def test_urls_of_fsspec(hashing: Embedder, tmp_path: Path) -> None:
    """A source and an output behind a URL: the same files as on this machine."""
    data = write(tmp_path / "a.csv", rows_of(50)).read_bytes()
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/in/a.csv", data)
    run(hashing, ["memory://bucket/in"], "memory://bucket/out", BulkOptions(rows_per_file=20))
    names = sorted(path.rpartition("/")[2] for path in files.ls("/bucket/out", detail=False))
    assert names == [*(f"00000-{i:06d}.parquet" for i in range(3)), "_manifest.json"]
    read = [pq.read_table(files.open(f"/bucket/out/{name}")) for name in names[:-1]]
    assert pa.concat_tables(read).num_rows == 50
    manifest = run(
        hashing, ["memory://bucket/in"], "memory://bucket/out", BulkOptions(rows_per_file=20)
    )
    assert len(manifest.files) == 3


def test_a_server_that_is_away_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job waits for it, and nothing is lost."""
    monkeypatch.setattr(embeddings, "LONGEST_WAIT_S", 0.05)
    source = write(tmp_path / "a.jsonl", rows_of(300))
    fake = FakeProvider()
    fake.fail(*[ServerUnreachable("away")] * 12)
    with Embedder(providers=[fake]) as embedder:
        run(embedder, [str(source)], str(tmp_path / "out"))
        expected = embedder.embed([row["text"] for row in rows_of(300)]).vectors
    assert np.array_equal(vectors_of(pq.read_table(tmp_path / "out")), expected)


def test_a_model_that_changes_ends_the_job(tmp_path: Path) -> None:
    """Another space midway is refused; the job goes on when the model is back."""
    source = write(tmp_path / "a.jsonl", rows_of(100))
    out, options = str(tmp_path / "out"), BulkOptions(rows_per_file=10)
    fake = FakeProvider()
    with Embedder(providers=[fake]) as embedder:

        def change(done: Done) -> None:
            if done.rows == 50:
                fake.change_model("another")

        with pytest.raises(SpaceRefused, match="space fake"):
            run(embedder, [str(source)], out, options, on_progress=change)
        written = Manifest.model_validate_json((tmp_path / "out/_manifest.json").read_text())
        assert 0 < len(written.files) < 10
        fake.change_model("fake")
        assert len(run(embedder, [str(source)], out, options).files) == 10
    assert pq.read_table(out).num_rows == 100


def test_each_file_says_which_space_it_has(hashing: Embedder, tmp_path: Path) -> None:
    """Space, precision, dims and counts are in the Parquet metadata of every file."""
    source = write(tmp_path / "a.jsonl", rows_of(10))
    manifest = run(hashing, [str(source)], str(tmp_path / "out"))
    metadata = pq.read_metadata(tmp_path / "out/00000-000000.parquet").metadata
    facts = json.loads(metadata[b"halimede"])
    assert facts["space"] == manifest.model.space == hashing.embed("a").space
    assert (facts["precision"], facts["dims"], facts["output_type"]) == (
        hashing.embed("a").precision,
        384,
        "float32",
    )
    assert facts["file"]["rows"] == 10


def test_one_process_at_a_time(hashing: Embedder, tmp_path: Path) -> None:
    """A second one is refused while the first is at work."""
    source = write(tmp_path / "a.jsonl", rows_of(10))
    out = str(tmp_path / "out")
    refused = []

    def second(done: Done) -> None:
        if not done.rows:
            with pytest.raises(InvalidInput, match="used by another process") as raised:
                run(hashing, [str(source)], out)
            refused.append(raised.value)

    run(hashing, [str(source)], out, on_progress=second)
    assert len(refused) == 1
