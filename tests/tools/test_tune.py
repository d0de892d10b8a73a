"""Tuning: which way is chosen, what is written, what a build keeps of it, and what is served."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import MODEL, NAMES, free_options, version_folder

from halimede import Embedder
from halimede_engine import cores
from halimede_ops import vectors
from halimede_ops.errors import ModelNotFound
from halimede_repository import configs
from halimede_tools.bench import tune
from halimede_tools.build import model_config, repository, towers
from halimede_tools.build.plan import build, build_request
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

OPENVINO = tune.Way("openvino", threads=2, streams=2)
PLAIN = tune.Way("", threads=2, streams=1)
NAME = NAMES["int8"]
BAR = towers.BARS["int8"]


def measured(
    way: tune.Way, texts_per_s: float, single_ms: float, cosine: float = 1.0
) -> tune.Measurement:
    return tune.Measurement(way, texts_per_s, single_ms, cosine)


def test_of_ways_alike_the_one_that_answers_soonest_is_chosen() -> None:
    """2 % fewer texts a second and half the latency wins; 10 % fewer do not."""
    fast, soon, slow = measured(OPENVINO, 500, 9), measured(PLAIN, 490, 5), measured(PLAIN, 450, 2)
    assert tune.choose([fast, soon, slow], BAR) is soon


def test_a_provider_with_other_vectors_is_not_chosen() -> None:
    """However fast: the build has not checked those vectors."""
    own, other = measured(OPENVINO, 400, 9), measured(PLAIN, 800, 2, cosine=0.99)
    assert tune.choose([own, other], BAR) is own


def test_another_arithmetic_is_chosen_within_the_bar_of_the_precision() -> None:
    """f32 instead of bf16 gives other vectors: as near as FP16 must be, and no further away."""
    bf16, f32 = (dataclasses.replace(OPENVINO, arithmetic=each) for each in ("bf16", "f32"))
    checked, near, far = (
        measured(bf16, 400, 9),
        measured(f32, 800, 5, cosine=0.9995),
        measured(f32, 900, 2, cosine=0.998),
    )
    assert tune.choose([checked, near, far], towers.BARS["fp16"]) is near


def test_f32_is_a_candidate_beside_bf16() -> None:
    """What the build checked comes first; onnxruntime's own engine has f32 only."""
    ways = tune.candidates(2, "bf16")
    assert ways[0] == tune.Way("openvino", 2, 2, arithmetic="bf16")
    assert {(way.provider, way.arithmetic) for way in ways} == {
        ("openvino", "bf16"),
        ("openvino", "f32"),
        ("", "f32"),
    }
    assert {way.arithmetic for way in tune.candidates(2, "int8")} == {"int8"}


@pytest.mark.parametrize("cores", [1, 2, 3, 16])
def test_the_first_candidate_is_what_the_backend_does_by_itself(cores: int) -> None:
    """All cores and two streams where there are two; no candidate has more streams than threads."""
    ways = tune.candidates(cores)
    assert ways[0] == tune.Way("openvino", cores, min(2, cores))
    assert len(set(ways)) == len(ways)
    assert all(1 <= way.streams <= way.threads <= cores for way in ways)


@pytest.fixture(scope="module")
def tuned(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A copy of the repository, its INT8 tuned for two seconds."""
    folder = tmp_path_factory.mktemp("tuned") / "repository"
    shutil.copytree(settings.repository, folder)
    copied = settings.model_copy(update={"repository": folder})
    tune.tune(copied, MODEL, ["int8"], seconds=2)
    return copied


def test_the_choice_and_its_table_lie_with_the_model(tuned: Settings) -> None:
    """Every way of both stages; the choice is of the second and its vectors are the build's."""
    onnx = version_folder(tuned.repository / f"{NAME}-onnx")
    record = json.loads((onnx / repository.TUNED).read_text())
    first, last = record["table"][: -len(tune.BUDGETS)], record["table"][-len(tune.BUDGETS) :]
    assert first[0]["way"] == dataclasses.asdict(tune.candidates(cores.available(), "int8")[0])
    [chosen] = [row for row in last if tune.Way(**row["way"]).parameters() == record["choice"]]
    assert chosen["cosine"] >= towers.BARS["int8"].invariance
    assert all(row["texts_per_s"] > 0 and row["single_ms"] > 0 for row in first + last)


@pytest.mark.usefixtures("sole_build")
def test_configs_ask_for_the_choice_and_a_build_keeps_it(tuned: Settings) -> None:
    """Of the version that is served, both ways to serve it; the other precisions have none."""
    way = dataclasses.replace(PLAIN, micro_batch_tokens=256)
    record = {"choice": way.parameters(), "table": []}
    repository.tune(NAME, record, tuned.repository)
    asked = [
        tuned.repository / f"{NAME}-onnx" / configs.CONFIG,
        tuned.repository / NAME / "configs" / repository.ONE_PROCESS,
    ]
    before = [path.read_text() for path in asked]
    build(build_request(MODEL), tuned)
    assert [path.read_text() for path in asked] == before
    for path in asked:
        written = model_config.read(path)
        told = {name: written.parameters[name].string_value for name in model_config.TUNED}
        assert told == {"intra_op_thread_count": "2", "streams": "1", "micro_batch_tokens": "256"}
        assert not written.optimization.execution_accelerators.cpu_execution_accelerator
    assert "streams" not in (tuned.repository / f"{MODEL}-onnx" / configs.CONFIG).read_text()


def test_what_is_tuned_is_served(
    tuned: Settings, server: wheel.Server, texts: list[str], tmp_path: Path
) -> None:
    """Every way gives the vectors that the model gave before."""
    options = free_options(models=(NAME,))
    way = dataclasses.replace(OPENVINO, streams=1, micro_batch_tokens=1024)
    repository.tune(NAME, {"choice": way.parameters()}, tuned.repository)
    with Embedder(server.grpc_address, NAME) as embedder:
        expected = embedder.embed(texts[:200]).vectors
    with wheel.serve(tuned.repository, tuned.python_backend, tmp_path, options) as other:
        with Embedder(other.grpc_address, NAME) as embedder:
            given = embedder.embed(texts[:200]).vectors
    assert vectors.cosine(given, expected).min() >= towers.BARS["int8"].invariance


def test_only_models_of_texts_that_are_there(tuned: Settings) -> None:
    """A model that is not built is told so."""
    with pytest.raises(ModelNotFound, match="make build"):
        tune.tune(tuned, "no-such-model", ["fp32"], seconds=1)
