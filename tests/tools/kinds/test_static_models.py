"""Static models, built and served by a real Triton, against the libraries that define them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import forms
import numpy as np
import onnx
import pytest
import small_models
from conftest import free_options, version_folder
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from halimede import Embedder
from halimede_engine import session
from halimede_ops import spec, vectors
from halimede_ops.errors import InvalidModel
from halimede_tools.build.check import cosines_to
from halimede_tools.build.kinds import static
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {name: form.make for name, form in forms.STATIC.items()}
TEXTS = corpus.check_texts()[:100]
"""100 mixed texts: empty, blank, odd, short and long ones."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Settings:
    folder = tmp_path_factory.mktemp("static")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, source in folders.items():
        build(build_request(str(source), name), home)
    return home


@pytest.fixture(scope="module", params=[False, True], ids=["one process", "steps"])
def served(
    request: pytest.FixtureRequest, home: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a Triton that serves all of them."""
    options = free_options(steps=request.param)
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


def by_definition(folder: Path, texts: list[str]) -> np.ndarray:
    """model2vec's definition: the mean of weighted rows of the table, unknown tokens left out."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    unknown = tokenizer.token_to_id("[UNK]")
    rows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: config.get("max_length")]
        ids = [id for id in ids if id != unknown]
        table = tensors["embeddings"].float()[
            tensors["mapping"][ids] if "mapping" in tensors else ids
        ]
        weighted = table * (tensors["weights"][ids][:, None] if "weights" in tensors else 1)
        rows.append(weighted.mean(dim=0).numpy() if ids else np.zeros(table.shape[1], np.float32))
    return vectors.normalise(np.stack(rows)) if config["normalize"] else np.stack(rows)


@pytest.mark.parametrize("name", FORMS)
def test_served_vectors_are_those_of_the_library(
    name: str, served: str, folders: dict[str, Path]
) -> None:
    """Cosine ≥ 0.99999 together and alone; a text without tokens has zeros, as there."""
    if name in ("model2vec", "plain"):
        expected = by_definition(folders[name], TEXTS)
    else:
        model = SentenceTransformer(str(folders[name]), device="cpu")
        expected = model.encode(TEXTS, show_progress_bar=False)
    with Embedder(served, name) as embedder:
        together = embedder.embed(TEXTS).vectors
        alone = np.concatenate([embedder.embed([text]).vectors for text in TEXTS])
    assert not expected[0].any()
    assert not together[0].any()
    assert cosines_to(together, expected).min() >= 0.99999
    assert cosines_to(alone, expected).min() >= 0.99999
    norms = np.linalg.norm(expected, axis=1)
    assert np.allclose(np.linalg.norm(together, axis=1), norms, rtol=1e-4)


def test_a_row_of_the_table_has_a_scale_of_its_own(home: Settings) -> None:
    """INT8 stores the table in int8, at the bar of any other INT8 model."""
    folder = version_folder(home.repository / "static-int8-onnx")
    graph = onnx.load(folder / session.FILE_NAME, load_external_data=False).graph
    tables = {entry.data_type for entry in graph.initializer if len(entry.dims) == 2}
    assert onnx.TensorProto.INT8 in tables
    assert session.file_bytes(folder / session.FILE_NAME) < 0.3 * session.file_bytes(
        version_folder(home.repository / "static-onnx") / session.FILE_NAME
    )


def test_the_token_limit_is_the_folders_own_or_lower(
    home: Settings, folders: dict[str, Path], tmp_path: Path
) -> None:
    """model2vec's config may name a limit; a build may lower it, and not raise it."""
    limits = {name: spec.load(version_folder(home.repository / name)).max_tokens for name in FORMS}
    assert limits == dict.fromkeys(FORMS, static.MAX_TOKENS) | {"plain": 64}
    settings = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    lowered = build_request(str(folders["static"]), "m", precisions=("fp32",), max_tokens=16)
    assert build(lowered, settings) == ["m"]
    raised = build_request(str(folders["plain"]), "m", precisions=("fp32",), max_tokens=65)
    with pytest.raises(InvalidModel, match="takes 1 to 64 tokens"):
        build(raised, settings)


def test_a_folder_without_a_table_is_named(tmp_path: Path) -> None:
    """The missing tensor is named."""
    (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    small_models.wordpiece().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidModel, match="no readable tensor `embeddings`"):
        static.load(tmp_path, "m")
