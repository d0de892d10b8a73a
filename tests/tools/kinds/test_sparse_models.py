"""Sparse models, built and served by a real Triton, against SparseEncoder on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_models
from conftest import free_options, version_folder
from tritonclient import grpc as triton_grpc

from halimede_ops import heads, spec, vectors
from halimede_tools.build import describe
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.kinds import overlap
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {
    "splade": small_models.like_splade,
    "splade-sums": small_models.like_splade_with_sums,
    "opensearch": small_models.like_opensearch_sparse,
    "few-ids": small_models.splade_with_few_ids,
    "auto-encoder": small_models.sparse_auto_encoder,
    "plain": small_models.wide_bert_mlm,
}
KINDS = {"plain": spec.SPARSE_KIND}
"""The kind that is asked for, where the folder does not say it."""
IN_STEPS = ("splade-sums", "few-ids")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """100 mixed texts: the odd ones, short and long."""
    return corpus.check_texts()[:20] + corpus.check_texts()[20:340:4]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("sparse")
    return Settings(home=folder / "home", repository=folder / "repository")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def served(
    home: Settings, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of one Triton that serves every form, in FP32."""
    for name, folder in folders.items():
        request = build_request(str(folder), name, precisions=("fp32",), kind=KINDS.get(name))
        assert build(request, home) == [name]
    options = free_options()
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


@pytest.fixture(scope="module")
def served_in_steps(
    served: str, home: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of one Triton that serves two forms as an ensemble's steps."""
    options = free_options(models=IN_STEPS, steps=True)
    run = tmp_path_factory.mktemp("steps")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


def ask(
    address: str, name: str, texts: list[str], input_type: str | None = None
) -> dict[str, np.ndarray]:
    """The outputs of one request, by plain tritonclient."""
    inputs = {"TEXT": texts} | ({"INPUT_TYPE": [input_type] * len(texts)} if input_type else {})
    tensors = []
    for key, values in inputs.items():
        tensors.append(triton_grpc.InferInput(key, [len(values), 1], "BYTES"))
        tensors[-1].set_data_from_numpy(np.array([[v.encode()] for v in values], np.object_))
    with triton_grpc.InferenceServerClient(address) as client:
        result = client.infer(name, tensors)
        return {key: result.as_numpy(key) for key in ("SPARSE_IDS", "SPARSE_WEIGHTS", "TOKENS")}


def dense(given: dict[str, np.ndarray], dims: int) -> np.ndarray:
    """The weights of an answer, `[texts, dims]`, once its form is checked."""
    ids, weights = given["SPARSE_IDS"], given["SPARSE_WEIGHTS"]
    rows = np.zeros((len(ids), dims), np.float32)
    for row, row_ids, row_weights in zip(rows, ids, weights, strict=True):
        count = int((row_ids != heads.NO_TOKEN).sum())
        assert (row_ids[count:] == heads.NO_TOKEN).all()
        assert not row_weights[count:].any()
        assert (np.diff(row_ids[:count]) > 0).all()
        assert (row_weights[:count] > 0).all()
        row[row_ids[:count]] = row_weights[:count]
    return rows


def expected_weights(
    folder: Path, name: str, texts: list[str], prompt: str | None = None
) -> np.ndarray:
    """SparseEncoder's own weights."""
    model = describe.load(folder, ModelOptions(name, kind=KINDS.get(name)))
    encoded = model.encode(
        texts, prompt=prompt, convert_to_sparse_tensor=False, show_progress_bar=False
    )
    return np.asarray(encoded)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("server", ["served", "served_in_steps"])
def test_weights_are_those_of_sparse_encoder(
    name: str,
    server: str,
    folders: dict[str, Path],
    home: Settings,
    texts: list[str],
    request: pytest.FixtureRequest,
) -> None:
    """FP32 cosine ≥ 0.99999 and the same ids, for plain texts, queries and documents, in a batch
    and alone.
    """
    if server == "served_in_steps" and name not in IN_STEPS:
        pytest.skip("served in one process alone")
    address = request.getfixturevalue(server)
    facts = spec.load(version_folder(home.repository / name))
    for input_type in (None, "query", "document"):
        prompt = facts.prompt(input_type)
        expected = expected_weights(folders[name], name, texts, prompt)
        together = ask(address, name, texts, input_type)
        rows = dense(together, facts.dims)
        assert expected.shape == rows.shape
        assert vectors.cosine(rows, expected).min() >= 0.99999
        assert overlap.agreement(rows, expected)["same_ids"] == 1
    alone = [ask(address, name, [text]) for text in texts]
    rows = np.concatenate([dense(given, facts.dims) for given in alone])
    assert vectors.cosine(rows, expected_weights(folders[name], name, texts)).min() >= 0.99999
