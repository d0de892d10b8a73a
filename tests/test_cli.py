"""The `halimede` command, run as a user runs it against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, NAMES, ROOT, free_options

from halimede_ops import vectors
from tools import triton
from tools.sts import spearman


def halimede(
    *arguments: str, server: triton.Server | None = None, given: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The command's result, asking this server."""
    environment = dict(os.environ)
    if server is not None:
        environment["HALIMEDE_URL"] = server.grpc_address
    command = [str(Path(sys.executable).parent / "halimede"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=given, capture_output=True, check=False
    )


def test_embed_prints_the_vector_of_sentence_transformers(
    server: triton.Server, source: Path
) -> None:
    """`halimede embed "hello world" --json` gives 384 numbers of cosine ≥ 0.99999."""
    from tools.check import reference

    done = halimede("embed", "hello world", "--json", server=server)
    answer = json.loads(done.stdout)
    vector = np.array([answer["embeddings"][0]["embedding"]])
    assert vector.shape == (1, 384)
    assert vectors.cosine(vector, reference(source, ["hello world"]))[0] >= 0.99999
    assert (answer["model"], answer["precision"], answer["dims"]) == (MODEL, "fp32", 384)


def test_texts_come_from_arguments_file_or_stdin(server: triton.Server, tmp_path: Path) -> None:
    """Two texts give the same vectors from each of the three."""
    file = tmp_path / "texts.txt"
    file.write_text("one\nзвезда\n")
    ways = [
        halimede("embed", "one", "звезда", "--json", server=server),
        halimede("embed", "--file", str(file), "--json", server=server),
        halimede("embed", "--json", server=server, given="one\nзвезда\n".encode()),
    ]
    answers = [json.loads(done.stdout)["embeddings"] for done in ways]
    first = np.array([row["embedding"] for row in answers[0]])
    for answer in answers:
        assert vectors.cosine(first, np.array([row["embedding"] for row in answer])).min() > 0.99999


def test_npy_holds_the_vectors(server: triton.Server, tmp_path: Path) -> None:
    """--npy writes `[texts, dims]` float32."""
    out = tmp_path / "vectors.npy"
    done = halimede("embed", "a", "b", "--dimensions", "16", "--npy", str(out), server=server)
    assert b"2 \xc3\x97 16 float32" in done.stdout
    array = np.load(out)
    assert (array.shape, array.dtype) == ((2, 16), np.float32)


def test_models_shows_every_precision_with_its_figures(server: triton.Server) -> None:
    """`halimede models --verbose` shows the build's figures of all three precisions."""
    done = halimede("models", "--verbose", "--json", server=server)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(NAMES.values())
    assert rows[NAMES["int8"]]["mean_cosine"] >= 0.995
    assert rows[NAMES["int8"]]["texts"] >= 500
    table = halimede("models", "--verbose", server=server).stdout.decode()
    assert "mean_cosine" in table
    assert NAMES["fp16"] in table


def test_health_tells_and_exits(server: triton.Server) -> None:
    """A healthy server gives exit code 0 and a latency; no server gives 1 and the reason."""
    done = halimede("health", "--json", server=server)
    report = json.loads(done.stdout)
    assert (done.returncode, report["healthy"]) == (0, True)
    assert 0 < report["latency_ms"] < 5000
    nowhere = f"127.0.0.1:{free_options().grpc_port}"
    gone = halimede("health", "--json", "--url", nowhere, "--timeout-s", "3")
    assert gone.returncode == 1
    assert nowhere in json.loads(gone.stdout)["error"]


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (["embed", "a", "--dimensions", "0"], None, "1 to 384"),
        (["embed", "a", "--input-type", "foo"], None, "document, query"),
        (["embed", "a", "--model", "none"], None, "none"),
        (["embed"], b"\xff\n", "stdin is not valid UTF-8"),
        (["embed", "--file", "/no/such/file"], None, "cannot be read"),
        (["embed", "a", "--file", "README.md"], None, "give one of them"),
        (["embed", "a", "--url", "ftp://x"], None, "host:port"),
    ],
)
def test_errors_are_one_line(
    server: triton.Server, arguments: list[str], given: bytes | None, message: str
) -> None:
    """Each error is one line on stderr, exit code 1, and no traceback."""
    done = halimede(*arguments, server=server, given=given)
    told = done.stderr.decode()
    assert done.returncode == 1
    assert done.stdout == b""
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1


def test_sts_is_measured_through_the_server(server: triton.Server, tmp_path: Path) -> None:
    """The STS tool ranks plain pairs as a person does."""
    from halimede import Embedder

    file = tmp_path / "sts.tsv"
    file.write_text(
        "score\tsentence1\tsentence2\n"
        "5\tA man is playing a guitar.\tA man plays the guitar.\n"
        "2.5\tA man is playing a guitar.\tA woman plays the flute.\n"
        "0\tA man is playing a guitar.\tThe stock market fell today.\n"
    )
    with Embedder(server.grpc_address) as embedder:
        assert spearman(file, lambda texts: embedder.embed(texts).vectors) == pytest.approx(100)


def test_nothing_of_a_text_is_in_the_servers_log(server: triton.Server) -> None:
    """A text, good or bad, leaves no trace in Triton's log."""
    halimede("embed", "xylophone-secret", server=server)
    halimede("embed", "a", "--input-type", "xylophone-secret", server=server)
    assert "xylophone" not in server.log.read_text(errors="replace")
