"""What the benchmark measures with: its texts, its processes, its count of operations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL

from halimede_ops import vectors
from halimede_ops.errors import InvalidInput
from halimede_tools.bench import quality, report
from halimede_tools.bench.peers import compare, engines, limit, tables
from halimede_tools.settings import Settings


@pytest.fixture(scope="module")
def own_home(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with a folder for the benchmark's files that no other process writes."""
    return settings.model_copy(update={"home": tmp_path_factory.mktemp("home")})


@pytest.fixture(scope="module")
def engine(own_home: Settings) -> Iterator[compare.Process]:
    """Our own engine in a process, as the benchmark starts it."""
    process = compare.Process(engines.ours("fp32")[0], own_home, MODEL)
    yield process
    process.close()


def test_texts_sent_alone_are_as_long_as_those_sent_together(settings: Settings) -> None:
    """Rates of both may be compared: the mean length differs by less than two in a hundred."""
    given = compare.texts()
    mixed, single = (
        np.mean(limit.lengths(settings, MODEL, given[kind])) for kind in ("mixed", "single")
    )
    assert abs(single / mixed - 1) < 0.02
    assert min(limit.lengths(settings, MODEL, given["long"])) == 256


def test_a_process_measures_and_gives_vectors(engine: compare.Process) -> None:
    """Each case has its seconds, singles their percentiles; vectors alone are those together."""
    together = engine.measure(compare.Case("together", "together", "mixed", 8))
    each = engine.measure(compare.Case("each", "each", "single", 8, concurrency=4))
    assert together["seconds"] > 0
    assert 0 < each["p50_ms"] <= each["p99_ms"] <= each["seconds"] * 1000
    assert min(together["cpu_s"], each["cpu_s"], engine.cold_start_s) > 0
    assert engine.memory_bytes() > 10**8
    texts, alone = engine.vectors()
    assert texts.shape == (compare.COMPARED, 384)
    assert vectors.cosine(texts[: compare.ALONE], alone).min() >= 0.99999


def test_operations_are_those_of_the_matrices(settings: Settings) -> None:
    """A layer of MiniLM multiplies each token by 12 h² weights, and with each token twice by h."""
    hidden, layers = 384, 6
    work = limit.work(settings, MODEL)
    weights = 2 * 12 * hidden**2 * layers
    products = 2 * 2 * hidden * layers
    assert work.operations([100]) == pytest.approx(weights * 100 + products * 100**2, rel=0.01)


def test_an_engine_that_ends_is_an_error(own_home: Settings) -> None:
    """The error names the engine and where to read more."""
    unknown = engines.Engine("nothing", "fp32", ("nothing",))
    with pytest.raises(compare.HalimedeError, match="nothing, fp32 ended by itself"):
        compare.Process(unknown, own_home, MODEL)


def test_the_conclusion_marks_what_misses_its_goal() -> None:
    """Ten times as fast is no 12.5; a figure that was not measured leaves its cell empty."""
    figures = {
        (tables.REFERENCE.name, "1000"): {"seconds": 10.0},
        (tables.REFERENCE.name, "100"): {"seconds": 1.0},
        (f"{tables.ENGINE}, int8", "1000"): {"seconds": 1.0},
        (f"{tables.ENGINE}, int8", "100"): {"seconds": 0.1},
    }
    lines = tables.conclusion(figures, ["fp32", "int8"])
    assert lines[0] == "| goal | bound | fp32 | int8 |"
    rows = [line.strip("| ").split(" | ")[1:] for line in lines[2:]]
    assert ["≥ 10.0", "", "10.0"] in rows
    assert ["≥ 12.5", "", "**10.0**"] in rows
    assert len(rows) == len(tables.GOALS)


def test_the_conclusion_compares_fp16_with_fp32() -> None:
    """Whatever the column is, the time of FP32 is that of FP32."""
    figures = {
        (tables.FP32, "1000"): {"seconds": 3.8},
        (f"{tables.ENGINE}, fp16", "1000"): {"seconds": 2.0},
        (f"{tables.ENGINE}, int8", "1000"): {"seconds": 1.0},
    }
    lines = tables.conclusion(figures, ["fp32", "fp16", "int8"])
    assert "| 1000 texts: times as fast as FP32 | ≥ 1.80 |  | 1.90 |  |" in lines


def test_quality_compares_texts_of_ones_own(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has a line for each length class that has texts, and one for all."""
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    file = tmp_path / "texts.txt"
    file.write_text("a short text\nanother one\n" + "many more words " * 10)
    lines = quality.quality(settings, MODEL, ("fp32",), file).read_text().splitlines()
    assert [line for line in lines if line.startswith("| fp32")] == [
        "| fp32 | f32 | 1-19 | 2 | 1.000000 | 1.000000 | 1.0000 |  |",
        "| fp32 | f32 | 20-63 | 1 | 1.000000 | 1.000000 | 1.0000 |  |",
        "| fp32 | f32 | all | 3 | 1.000000 | 1.000000 | 1.0000 |  |",
    ]


def test_quality_refuses_a_file_without_texts(settings: Settings, tmp_path: Path) -> None:
    """And says what to give."""
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InvalidInput, match="one text a line"):
        quality.quality(settings, MODEL, ("fp32",), tmp_path / "empty.txt")
