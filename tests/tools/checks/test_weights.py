"""A model with a weight that is not finite is refused before it is exported, by the weight's name."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from halimede_engine import session
from halimede_ops import spec
from halimede_ops.errors import InvalidModel
from halimede_tools.build import check, towers
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.export import export
from halimede_tools.build.graph import rewrite


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {
        "bge": small_models.like_bge(parent / "bge"),
        "bge-m3": small_models.like_bge_m3(parent / "bge-m3"),
    }


def spoilt(tensor: str, place: tuple[int, ...], value: float) -> Callable[[Path], str]:
    """Puts a value into one weight of a folder; the name of its tensor."""

    def spoil(folder: Path) -> str:
        state = load_file(folder / "model.safetensors")
        state[tensor][place] = value
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return tensor

    return spoil


def spoilt_head(folder: Path) -> str:
    state = torch.load(folder / "sparse_linear.pt", weights_only=True)
    state["bias"][0] = math.nan
    torch.save(state, folder / "sparse_linear.pt")
    return r"linear\.bias"


def spoilt_graph(folder: Path) -> str:
    """Makes the folder one with nothing but ONNX, with NaN in the embedding of one token."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    model = ORTModelForFeatureExtraction.from_pretrained(folder, export=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    graph = onnx.load(folder / "model.onnx")
    [table] = [entry for entry in graph.graph.initializer if "word_embeddings" in entry.name]
    values = onnx.numpy_helper.to_array(table).copy()
    values[-1, 0] = math.nan
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(graph, folder / "model.onnx")
    return "word_embeddings"


LAYER = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("form", "spoil"),
    [
        ("bge", spoilt("embeddings.word_embeddings.weight", (1499, 7), math.nan)),
        ("bge", spoilt(LAYER, (3, 3), math.nan)),
        ("bge", spoilt(LAYER, (3, 3), -math.inf)),
        ("bge-m3", spoilt_head),
        ("bge", spoilt_graph),
    ],
    ids=["one token", "NaN", "infinity", "head", "ONNX alone"],
)
def test_a_weight_that_is_not_finite_is_named(
    folders: dict[str, Path], tmp_path: Path, form: str, spoil: Callable[[Path], str]
) -> None:
    """In the embedding of one token, which the check's texts need not have, too."""
    folder = Path(shutil.copytree(folders[form], tmp_path / form))
    tensor = spoil(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidModel, match=f"NaN or infinite, in .*{tensor}"):
        export(folder, ModelOptions("m"), tmp_path / "out")


def test_vectors_that_are_not_finite_miss_the_bar(folders: dict[str, Path], tmp_path: Path) -> None:
    """A precision whose vectors are not finite is measured, not raised as an error of one text."""
    export(folders["bge"], ModelOptions("m"), tmp_path)
    path, facts = tmp_path / session.FILE_NAME, spec.load(tmp_path)
    model = rewrite.load(path)
    [table] = [entry for entry in model.graph.initializer if "word_embeddings" in entry.name]
    values = onnx.numpy_helper.to_array(table).copy()
    values[:] = math.nan
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    rewrite.save(model, path)
    engine = towers.Engine(path, towers.text_rows(tmp_path, facts), facts)
    tower = dataclasses.replace(towers.TEXTS, odd_inputs=0)
    inputs = ["a text", "another text of some more words"]
    ones = np.ones((2, 64), np.float32)
    record = check.check("fp32", path, path, engine, tower, inputs, ones, {})
    assert record["not_finite"] == 2
    assert "2 vectors are not finite" in record["missed"]
