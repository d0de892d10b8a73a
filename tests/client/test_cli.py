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
from halimede_tools.build.samples.sts import spearman
from halimede_tools.serve import wheel


def halimede(
    *arguments: str, server: wheel.Server | None = None, given: bytes | None = None
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
    server: wheel.Server, source: Path
) -> None:
    """`halimede embed "hello world" --json` gives 384 numbers of cosine ≥ 0.99999."""
    from halimede_tools.build.check import reference
    from halimede_tools.build.describe import ModelOptions

    done = halimede("embed", "hello world", "--json", server=server)
    answer = json.loads(done.stdout)
    vector = np.array([answer["embeddings"][0]["embedding"]])
    assert vector.shape == (1, 384)
    assert (
        vectors.cosine(vector, reference(source, ["hello world"], ModelOptions(MODEL)))[0]
        >= 0.99999
    )
    assert (answer["model"], answer["precision"], answer["dims"]) == (MODEL, "fp32", 384)


def test_texts_come_from_arguments_file_or_stdin(server: wheel.Server, tmp_path: Path) -> None:
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


def test_npy_holds_the_vectors(server: wheel.Server, tmp_path: Path) -> None:
    """--npy writes `[texts, dims]` float32."""
    out = tmp_path / "vectors.npy"
    done = halimede("embed", "a", "b", "--dimensions", "16", "--npy", str(out), server=server)
    assert b"2 \xc3\x97 16 float32" in done.stdout
    array = np.load(out)
    assert (array.shape, array.dtype) == ((2, 16), np.float32)


def test_models_shows_every_precision_with_its_figures(server: wheel.Server) -> None:
    """`halimede models --verbose` shows the build's figures of all three precisions."""
    done = halimede("models", "--verbose", "--json", server=server)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(NAMES.values())
    assert rows[NAMES["int8"]]["mean_cosine"] >= 0.995
    assert rows[NAMES["int8"]]["texts"] >= 500
    assert rows[NAMES["int8"]]["p1_cosine"] >= 0.98
    assert {row["arithmetic"] for row in rows.values()} >= {"f32", "int8"}
    table = halimede("models", "--verbose", server=server).stdout.decode()
    assert "mean_cosine" in table
    assert NAMES["fp16"] in table


def test_health_tells_and_exits(server: wheel.Server) -> None:
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
        (["embed"], b"\xff\n", "stdin is not UTF-8 (line 1)"),
        (["embed", "--file", "/no/such/file"], None, "cannot be read"),
        (["embed", "a", "--file", "README.md"], None, "give one of them"),
        (["embed", "a", "--url", "ftp://x"], None, "host:port"),
    ],
)
def test_errors_are_one_line(
    server: wheel.Server, arguments: list[str], given: bytes | None, message: str
) -> None:
    """Each error is one line on stderr, exit code 1, and no traceback."""
    done = halimede(*arguments, server=server, given=given)
    told = done.stderr.decode()
    assert done.returncode == 1
    assert done.stdout == b""
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1


def test_sts_is_measured_through_the_server(server: wheel.Server, tmp_path: Path) -> None:
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


def test_nothing_of_a_text_is_in_the_servers_log(server: wheel.Server) -> None:
    """A text, good or bad, leaves no trace in Triton's log."""
    halimede("embed", "xylophone-secret", server=server)
    halimede("embed", "a", "--input-type", "xylophone-secret", server=server)
    assert "xylophone" not in server.log.read_text(errors="replace")


CONFIG = """
models:
  server: {{provider: triton, model_id: all-MiniLM-L6-v2, url: "{address}"}}
  local: {{provider: onnx, model_id: all-MiniLM-L6-v2-int8}}
fallback: [local]
cache:
  disk: {{path: "{folder}"}}
"""


@pytest.fixture
def config(server: wheel.Server, tmp_path: Path) -> Path:
    file = tmp_path / "halimede.yaml"
    file.write_text(CONFIG.format(address=server.grpc_address, folder=tmp_path / "cache"))
    return file


def test_a_configuration_is_checked(config: Path, tmp_path: Path) -> None:
    """`halimede config check` tells the chain, or the nearest key in one line with exit code 1."""
    facts = json.loads(halimede("config", "check", str(config), "--json").stdout)
    assert facts["chain"] == [f"triton:{MODEL}", f"onnx:{NAMES['int8']}"]
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(config.read_text().replace("fallback", "falback"))
    done = halimede("config", "check", str(wrong))
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"falback is not known. Did you mean fallback?" in done.stderr


def test_a_chain_embeds_and_caches(config: Path, tmp_path: Path) -> None:
    """With the server gone the fallback answers, labelled; `cache` shows and clears the tiers."""
    done = halimede("embed", "a", "--json", "--config", str(config))
    assert json.loads(done.stdout)["provider"] == "triton"
    gone = f"127.0.0.1:{free_options().grpc_port}"
    done = halimede("embed", "b", "--json", "--config", str(config), "--url", gone)
    answer = json.loads(done.stdout)
    assert (answer["provider"], answer["precision"]) == ("onnx", "int8")
    rows = json.loads(halimede("cache", "stats", "--json", "--config", str(config)).stdout)
    assert [row["tier"] for row in rows] == ["memory", "disk"]
    done = halimede("cache", "clear", "--json", "--config", str(config))
    assert json.loads(done.stdout) == {"cleared": True}
    assert b"no `cache`" in halimede("cache", "stats").stderr
    reports = json.loads(
        halimede("health", "--json", "--config", str(config), "--url", gone).stdout
    )
    assert [report["healthy"] for report in reports] == [False, True]


def test_similarity_and_compare(server: wheel.Server, tmp_path: Path) -> None:
    """Cosines between texts, and between the vectors two models give the same texts."""
    texts = ["A man plays guitar.", "A man is playing a guitar.", "The market fell."]
    done = halimede("similarity", *texts, "--json", server=server)
    matrix = np.array(json.loads(done.stdout)["similarity"])
    assert np.allclose(np.diag(matrix), 1, atol=1e-4)
    assert matrix[0, 1] > 0.8 > 0.3 > matrix[0, 2]
    assert len(halimede("similarity", *texts, server=server).stdout.splitlines()) == 3
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    done = halimede("compare", MODEL, NAMES["int8"], "--file", str(file), "--json", server=server)
    facts = json.loads(done.stdout)
    assert facts["comparable"]
    assert 0.98 < facts["mean_cosine"] <= 1
    nothing = halimede("compare", MODEL, NAMES["int8"], server=server, given=b"")
    assert b"no text" in nothing.stderr


def test_exit_codes_tell_what_may_pass() -> None:
    """3 when the same command may succeed later, 2 for wrong usage."""
    gone = f"127.0.0.1:{free_options().grpc_port}"
    done = halimede("embed", "a", "--url", gone)
    assert (done.returncode, done.stdout) == (3, b"")
    assert gone.encode() in done.stderr
    assert halimede("embed", "--no-such-option").returncode == 2


def test_output_types_are_printed_and_written(server: wheel.Server, tmp_path: Path) -> None:
    """binary gives 48 bytes a text; int8 wants ranges."""
    out = tmp_path / "vectors.npy"
    done = halimede("embed", "a", "b", "--output-type", "binary", "--npy", str(out), server=server)
    assert b"384 binary" in done.stdout
    assert np.load(out).shape == (2, 48)
    ranges = tmp_path / "ranges.npy"
    np.save(ranges, np.array([[-0.2] * 384, [0.2] * 384], np.float32))
    int8 = ("embed", "a", "--output-type", "int8", "--json")
    assert b"ranges" in halimede(*int8, server=server).stderr
    done = halimede(*int8, "--ranges", str(ranges), server=server)
    assert len(json.loads(done.stdout)["embeddings"][0]["embedding"]) == 384
