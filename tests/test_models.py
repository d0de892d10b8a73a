"""Any model's folder, built and served by a real Triton, against sentence-transformers on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from conftest import free_options
from sentence_transformers import models as st
from tritonclient import grpc as triton_grpc

from halimede import Embedder
from halimede_ops import heads, session, spec, vectors
from tools import corpus, describe, triton
from tools.build import build, order
from tools.check import Engine
from tools.describe import Reading
from tools.settings import Settings

FORMS = {
    "bert": small_models.bert,
    "minilm": small_models.like_minilm,
    "bge": small_models.like_bge,
    "e5": small_models.like_e5,
    "multilingual-minilm": small_models.like_multilingual_minilm,
    "mpnet": small_models.like_mpnet,
    "distiluse": small_models.like_distiluse,
    "codebert": small_models.roberta,
    "qwen3": small_models.like_qwen3,
    "embeddinggemma": small_models.like_embeddinggemma,
    "bge-m3": small_models.like_bge_m3,
    "clip": small_models.clip,
    "sentence-clip": small_models.like_sentence_clip,
}
WIDTHS = (64, 48, 32, 16)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """100 mixed texts: the odd ones, short and long."""
    return corpus.check_texts()[:20] + corpus.check_texts()[20:340:4]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("small")
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
        build(order(str(folder), name, precisions=("fp32",)), home)
    options = free_options()
    run = tmp_path_factory.mktemp("run")
    with triton.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


@pytest.mark.parametrize("name", FORMS)
def test_served_vectors_are_sentence_transformers_own(
    name: str, served: str, folders: dict[str, Path], home: Settings, texts: list[str]
) -> None:
    """FP32 cosine ≥ 0.99999 for plain texts, queries and documents, at every width."""
    reference = describe.load(folders[name], Reading(name))
    facts = spec.load(home.repository / name / "1")
    with Embedder(served, name, timeout_s=120) as embedder:
        for input_type in (None, "query", "document"):
            prompt = facts.prompt(input_type)
            expected = reference.encode(texts, prompt=prompt, show_progress_bar=False)
            for width in {min(width, facts.dims) for width in WIDTHS}:
                got = embedder.embed(texts, input_type=input_type, dimensions=width).vectors
                assert vectors.cosine(got, expected[:, :width]).min() >= 0.99999
            assert np.allclose(
                np.linalg.norm(embedder.embed(texts, input_type=input_type).vectors, axis=1),
                np.linalg.norm(expected, axis=1),
                rtol=1e-3,
            )


def all_outputs(served: str, name: str, texts: list[str], *outputs: str) -> dict[str, np.ndarray]:
    """The named outputs of one request to an ensemble, by plain tritonclient."""
    with triton_grpc.InferenceServerClient(served) as client:
        tensor = triton_grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], np.object_))
        result = client.infer(name, [tensor])
        return {output: result.as_numpy(output) for output in outputs}


def test_sparse_and_multi_vectors_come_from_the_same_pass(
    served: str, folders: dict[str, Path], texts: list[str]
) -> None:
    """bge-m3's further heads equal their definition on transformers' own hidden states."""
    some = texts[32:48] + ["", "again and again and again"]
    folder = folders["bge-m3"]
    got = all_outputs(served, "bge-m3", some, "SPARSE_IDS", "SPARSE_WEIGHTS", "MULTI_VECTORS")
    model = describe.load(folder, Reading("bge-m3"))
    sparse, multi = (
        torch.load(folder / file, weights_only=True)
        for file in (describe.SPARSE_FILE, describe.MULTI_VECTOR_FILE)
    )
    special = {model.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<pad>", "<unk>")}
    for row, text in enumerate(some):
        inputs = model.tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            hidden = model[0].auto_model(**inputs).last_hidden_state[0]
        weights = torch.relu(hidden @ sparse["weight"].T + sparse["bias"])[:, 0].numpy()
        expected: dict[int, float] = {}
        for token, weight in zip(inputs["input_ids"][0].tolist(), weights, strict=True):
            if token not in special and weight > 0:
                expected[token] = max(expected.get(token, 0.0), float(weight))
        filled = got["SPARSE_IDS"][row] != heads.NO_TOKEN
        found = dict(
            zip(got["SPARSE_IDS"][row][filled].tolist(), got["SPARSE_WEIGHTS"][row][filled])
        )
        assert found.keys() == expected.keys()
        assert all(abs(found[token] - expected[token]) < 1e-4 for token in found)
        vectors_a_token = hidden[1:] @ multi["weight"].T + multi["bias"]
        wanted = torch.nn.functional.normalize(vectors_a_token, dim=-1).numpy()
        given = got["MULTI_VECTORS"][row]
        assert vectors.cosine(given[: len(wanted)], wanted).min() >= 0.99999
        assert not given[len(wanted) :].any()


def test_token_embeddings_for_a_model_that_asks(
    folders: dict[str, Path], tmp_path: Path, texts: list[str]
) -> None:
    """`token_embeddings` adds the last hidden state to the graph, for real tokens alone."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    options = {"precisions": ("fp32",), "token_embeddings": True}
    build(order(str(folders["mpnet"]), "mpnet", **options), home)
    options = free_options()
    (tmp_path / "run").mkdir()
    with triton.serve(home.repository, home.python_backend, tmp_path / "run", options):
        address = f"127.0.0.1:{options.grpc_port}"
        got = all_outputs(
            address, "mpnet", ["a longer text of some words", "a"], "TOKEN_EMBEDDINGS"
        )
    model = describe.load(folders["mpnet"], Reading("mpnet"))
    for row, text in enumerate(["a longer text of some words", "a"]):
        expected = model.encode(text, output_value="token_embeddings").numpy()
        given = got["TOKEN_EMBEDDINGS"][row]
        assert vectors.cosine(given[: len(expected)], expected).min() >= 0.99999
        assert not given[len(expected) :].any()


def test_pooling_modes(tmp_path: Path, texts: list[str]) -> None:
    """Every mode of sentence-transformers, and all of them side by side."""
    modes = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    for mode in (*modes, modes):
        name = mode if isinstance(mode, str) else "all"
        folder = small_models.sentence_transformer(
            small_models.bert, tmp_path / name, st.Pooling(64, mode), max_tokens=128
        )
        got = exported(folder, tmp_path / f"{name}-onnx").embed(texts)
        expected = describe.load(folder, Reading(name)).encode(texts)
        assert got.shape == expected.shape
        assert vectors.cosine(got, expected).min() >= 0.99999


def test_layer_norm_and_default_prompt(tmp_path: Path, texts: list[str]) -> None:
    """A LayerNorm module and a default prompt act as in sentence-transformers."""
    folder = small_models.sentence_transformer(
        small_models.bert, tmp_path / "model", st.Pooling(64, "mean"), st.LayerNorm(64),
        max_tokens=64, prompts={"query": "find: ", "passage": "text: "}, default_prompt="query",
    )  # fmt: skip
    engine = exported(folder, tmp_path / "onnx")
    expected = describe.load(folder, Reading("m")).encode(texts)
    assert vectors.cosine(engine.embed(texts), expected).min() >= 0.99999
    assert engine.spec.prompts["document"] == "text: "


def test_folder_with_nothing_but_onnx(folders: dict[str, Path], tmp_path: Path, texts) -> None:
    """A ready-made ONNX transformer, token types and all, gets its pooling from the folder."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    folder = tmp_path / "ready"
    shutil.copytree(folders["bge"], folder)
    model = ORTModelForFeatureExtraction.from_pretrained(folders["bge"], export=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    engine = exported(folder, tmp_path / "onnx")
    expected = describe.load(folders["bge"], Reading("bge")).encode(texts)
    assert vectors.cosine(engine.embed(texts), expected).min() >= 0.99999


def exported(source: Path, folder: Path) -> Engine:
    """The engine of a folder that was exported, and nothing else."""
    from tools.export import export

    folder.mkdir()
    export(source, Reading("m"), folder)
    return Engine(folder / session.FILE_NAME, folder, spec.load(folder))
