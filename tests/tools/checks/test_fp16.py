"""FP16 on a device that computes in float16: nothing overflows, and every graph is valid ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models
from conftest import MODEL, PRECISIONS
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from halimede_engine import session
from halimede_ops import spec, vectors
from halimede_ops.spec import POOLED
from halimede_tools.build import fp16, towers
from halimede_tools.build.checks import overflow
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.export import export
from halimede_tools.build.graph import rewrite
from halimede_tools.build.plan import build, build_request
from halimede_tools.settings import Settings

TEXTS = ["hello world", "a second text of some more words", "", "漢字"]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model whose values between two layers exceed float16, as those of T5 do."""
    folder = tmp_path_factory.mktemp("overflowing")
    source = small_models.like_bge(folder / "source")
    state = load_file(source / "model.safetensors")
    layer = "encoder.layer.0"
    state[f"{layer}.attention.output.LayerNorm.weight"] *= 300
    state[f"{layer}.intermediate.dense.weight"] *= 300
    state[f"{layer}.output.dense.weight"] /= 100
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    (folder / "fp32").mkdir()
    export(source, ModelOptions("m"), folder / "fp32")
    return folder / "fp32"


def in_float16(exported: Path, target: Path) -> np.ndarray:
    """The vectors of TEXTS by an FP16 graph, each operator computed in the type that it names."""
    target.mkdir()
    facts = spec.load(exported)
    fp16.quantise(exported, "texts", facts, target)
    evaluator = ReferenceEvaluator(rewrite.load(target / session.FILE_NAME))
    rows = towers.text_rows(exported, facts)(TEXTS)
    with np.errstate(all="ignore"):
        return np.concatenate([evaluator.run([POOLED], towers.feed(row))[0] for row in rows])


def test_values_too_large_for_float16_stay_in_float32(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors computed in float16 are those of FP32; without the search they are not."""
    facts = spec.load(overflowing)
    rows = towers.text_rows(overflowing, facts)
    expected = towers.Engine(overflowing / session.FILE_NAME, rows, facts).embed(TEXTS)
    got = in_float16(overflowing, tmp_path / "kept")
    assert vectors.cosine(got, expected).min() >= 0.999
    large = json.loads((tmp_path / "kept" / "quantised.json").read_text())["too_large_for_fp16"]
    assert 0 < len(large) < 15
    assert all("layer.0" in name for name in large)
    monkeypatch.setattr(overflow, "overflowing", lambda *_: set())
    assert not np.isfinite(in_float16(overflowing, tmp_path / "unkept")).all()


def test_an_ordinary_model_keeps_nothing_more_in_float32(settings: Settings) -> None:
    record = settings.models / MODEL / "fp16" / "quantised.json"
    assert json.loads(record.read_text()) == {"too_large_for_fp16": []}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_default_models_graphs_are_valid(settings: Settings, precision: str) -> None:
    model = rewrite.load(settings.models / MODEL / precision / session.FILE_NAME)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(
    "form",
    [
        small_models.like_minilm,
        small_models.like_qwen3,
        small_models.like_bge_m3,
        small_models.clip,
        small_models.bert_reranker,
    ],
)
def test_every_published_graph_is_valid(form: object, tmp_path: Path) -> None:
    """In every precision, with heads, of texts and images, and of scores."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    source = form(tmp_path / "source")
    build(build_request(str(source), "m", accepted=PRECISIONS), home)
    graphs = sorted(home.repository.glob("*/*/model.onnx"))
    assert {path.parent.parent.name for path in graphs} >= {"m-onnx", "m-fp16-onnx", "m-int8-onnx"}
    for path in graphs:
        onnx.checker.check_model(rewrite.load(path), full_check=True)


def test_nodes_are_sorted_with_what_their_branches_use() -> None:
    """A node follows those whose outputs it uses, in its branches too; the others keep their order."""
    from onnx import TensorProto, helper

    def given(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])

    branch = helper.make_graph([helper.make_node("Neg", ["a"], ["n"])], "b", [], [given("n")])
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Identity", ["b"], ["a"]),
        helper.make_node("Abs", ["x"], ["z"]),
        helper.make_node("Identity", ["x"], ["b"]),
    ]
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [1])
    graph = helper.make_graph(nodes, "g", [given("x"), condition], [given("y"), given("z")])
    rewrite.sort_nodes(graph)
    assert [node.output[0] for node in graph.node] == ["z", "b", "a", "y"]
    onnx.checker.check_model(helper.make_model(graph), full_check=True)
