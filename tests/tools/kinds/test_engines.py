"""Architectures that one engine cannot run, or of which no graph can be made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import forms
import numpy as np
import pytest
import small_models
from conftest import free_options, version_folder
from sentence_transformers import CrossEncoder

from halimede import Embedder, Reranker
from halimede_ops import vectors
from halimede_ops.errors import InvalidModel
from halimede_tools.build import describe
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {name: form.make for name, form in forms.ENGINES.items()}
TEXTS = [*corpus.check_texts()[:20], *corpus.check_texts()[20:340:8]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Settings:
    folder = tmp_path_factory.mktemp("engines")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, source in folders.items():
        build(build_request(str(source), name, precisions=("fp32",)), home)
    return home


@pytest.fixture(scope="module")
def served(home: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Triton that serves all of them."""
    options = free_options()
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


@pytest.mark.parametrize("name", [name for name in FORMS if "reranker" not in name])
def test_served_vectors_are_sentence_transformers_own(
    name: str, served: str, home: Settings, folders: dict[str, Path]
) -> None:
    """Cosine ≥ 0.99999 on a real Triton and in process."""
    expected = describe.load(folders[name], ModelOptions(name)).encode(TEXTS)
    in_process = {"provider": "onnx", "model_id": name, "path": str(home.repository)}
    with (
        Embedder(served, name) as remote,
        Embedder(model=name, config={"models": {name: in_process}}) as local,
    ):
        for embedder in (remote, local):
            assert vectors.cosine(embedder.embed(TEXTS).vectors, expected).min() >= 0.99999


def test_a_reranker_that_openvino_cannot_open_is_served(
    served: str, home: Settings, folders: dict[str, Path]
) -> None:
    """DeBERTa-v2: the CPU engine of onnxruntime runs it, and the configs and the record say so."""
    pairs = corpus.check_pairs()[::16]
    model = CrossEncoder(str(folders["deberta-reranker"]), device="cpu")
    expected = model.predict([list(pair) for pair in pairs], show_progress_bar=False)
    with Reranker("deberta-reranker", url=served) as reranker:
        assert np.abs(reranker.score(pairs).scores - expected).max() <= 1e-4
    folder = version_folder(home.repository / "deberta-reranker")
    assert json.loads((folder / "quality.json").read_text())["engine"] == "cpu"
    for path in (folder.parent / "configs").glob("*.pbtxt"):
        assert "openvino" not in path.read_text()


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mixtral": (small_models.mixtral, "cannot be traced to a graph, because it is a mixture of"),
    "mamba": (small_models.mamba, "cannot be traced to a graph, because it is a state-space model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_refused_before_any_work(
    name: str, home: Settings, tmp_path: Path
) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InvalidModel, match=words):
        build(build_request(str(make(tmp_path / name)), name, precisions=("fp32",)), home)
