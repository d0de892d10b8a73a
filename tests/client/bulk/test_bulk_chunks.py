"""Bulk jobs over chunks of long texts, with the default model in process."""

from __future__ import annotations

import json
from pathlib import Path

import late_models
import numpy as np
import pyarrow.parquet as pq
from conftest import MODEL

from halimede import Embedder
from halimede.bulk import BulkOptions, run
from halimede_tools.build.plan import build, build_request
from halimede_tools.settings import Settings

TEXTS = [
    " ".join(f"Sentence {i} of the first text, and it says so." for i in range(60)),
    "",
    None,
    "Short. 🙂",
    "wörter ohne ende " * 300,
]


def test_a_vector_for_each_chunk(settings: Settings, tmp_path: Path) -> None:
    """Each chunk has its place in the text and the vector of that part; no chunk is truncated."""
    source = tmp_path / "a.jsonl"
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "models": {"m": {"provider": "onnx", "model_id": MODEL, "path": str(settings.repository)}}
    }
    options = BulkOptions(
        id_column="id", chunk_tokens=64, chunk_overlap=12, errors="collect", rows_per_file=2
    )
    with Embedder(config=config) as embedder:
        manifest = run(embedder, [str(source)], str(tmp_path / "out"), options)
        table = pq.read_table(tmp_path / "out").to_pylist()
        for number, text in enumerate(TEXTS):
            own = [row for row in table if row["id"] == number]
            if text is None:
                assert own[0]["vector"] is None and "row 2 has nothing" in own[0]["error"]
                assert (own[0]["start"], own[0]["end"], len(own)) == (None, None, 1)
                continue
            assert [row["chunk"] for row in own] == list(range(len(own)))
            parts = [text[row["start"] : row["end"]] for row in own]
            assert np.allclose(
                [row["vector"] for row in own], embedder.embed(parts).vectors, atol=1e-5
            )
            assert all(row["tokens"] <= 64 and not row["truncated"] for row in own)
            covered = {i for row in own for i in range(row["start"], row["end"])}
            assert not "".join(c for i, c in enumerate(text) if i not in covered).strip()
    assert sum(file.source_rows for file in manifest.files.values()) == len(TEXTS)
    assert len(table) > 20


def test_late_chunks(tmp_path: Path) -> None:
    """The vectors of `embed_documents(late=True)`; a text without a token gets an error."""
    small = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    folder = late_models.MODELS["bert"](tmp_path / "bert")
    asked = build_request(str(folder), "bert", precisions=("fp32",), late_chunking=True)
    build(asked, small)
    texts = ["one two three four. " * 20, "five six. seven eight nine ten." * 6, None, "  "]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = BulkOptions(chunk_tokens=24, late=True, errors="collect")
    config = {"provider": "onnx", "model_id": "bert", "path": str(small.repository)}
    with Embedder(config={"models": {"bert": config}}) as embedder:
        run(embedder, [str(source)], str(tmp_path / "out"), options)
        table = pq.read_table(tmp_path / "out").to_pylist()
        for number in (0, 1):
            own = [row for row in table if row["row"] == number]
            spans = [(row["start"], row["end"]) for row in own]
            expected = embedder.embed_documents(
                texts[number], spans=[spans], late=True, input_type=None
            )
            assert len(own) > 2
            assert np.allclose([row["vector"] for row in own], expected.vectors, atol=1e-5)
        for number in (2, 3):
            [row] = [row for row in table if row["row"] == number]
            assert row["vector"] is None and row["error"]
