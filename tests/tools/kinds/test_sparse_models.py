"""Sparse models, built and served by a real Triton, against SparseEncoder on the same weights."""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forms
import numpy as np
import pytest
import small_models
from conftest import free_options, version_folder
from onnx import TensorProto, numpy_helper
from tritonclient import grpc as triton_grpc

from halimede import Embedder
from halimede.providers import onnx
from halimede_engine import session
from halimede_engine.engine import SharedEngine, text_rows
from halimede_engine.response_cache import ResponseCache
from halimede_engine.scheduler import Scheduler
from halimede_ops import heads, sparse, spec, text, vectors
from halimede_ops.errors import InvalidModel, NonFiniteVector
from halimede_ops.sparse import SparseRow
from halimede_tools.build import describe, export, model_config, towers
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.graph import rewrite
from halimede_tools.build.kinds import overlap
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {name: form.make for name, form in forms.SPARSE.items()}
KINDS = {"plain": spec.SPARSE_KIND, "mute": spec.SPARSE_KIND}
"""The kind that is asked for, where the folder does not say it."""
IN_STEPS = ("sums", "xlm-roberta")
SERVED = [(name, "served") for name in FORMS] + [(name, "served_in_steps") for name in IN_STEPS]
NAN_TOKEN = 700


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
    made = FORMS | {"mute": small_models.mute_splade}
    return {name: make(parent / name) for name, make in made.items()}


@pytest.fixture(scope="module")
def served(
    home: Settings, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of one Triton with a response cache that serves every form, in FP32."""
    for name, folder in folders.items():
        request = build_request(str(folder), name, precisions=("fp32",), kind=KINDS.get(name))
        assert build(request, home) == [name]
    options = free_options(response_cache_mb=1)
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


@pytest.mark.parametrize(("name", "server"), SERVED)
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


@pytest.mark.parametrize("host", ["Triton", "in process"])
def test_client_embeds_sparse_in_both_hosts(
    host: str, served: str, folders: dict[str, Path], home: Settings, texts: list[str]
) -> None:
    """`embed_sparse` gives the weights of SparseEncoder, in order, with the count of tokens."""
    options: dict[str, Any] = {"url": served, "model": "sums", "timeout_s": 120}
    if host == "in process":
        in_process = onnx.Options(model_id="sums", path=home.repository)
        options = {"providers": onnx.connect(in_process)}
    with Embedder(**options) as embedder:
        given = embedder.embed_sparse(texts, input_type="query")
    rows = np.zeros((len(texts), small_models.VOCABULARY), np.float32)
    for row, ids, weights in zip(rows, given.ids, given.weights, strict=True):
        row[ids] = weights
    expected = expected_weights(folders["sums"], "sums", texts, "query: ")
    assert vectors.cosine(rows, expected).min() >= 0.99999
    assert (given.tokens > 0).all()


def test_a_text_without_weights_has_no_ids(served: str) -> None:
    """All logits below 0 give rows without a single id."""
    given = ask(served, "mute", ["some text", ""])
    assert given["SPARSE_IDS"].shape == given["SPARSE_WEIGHTS"].shape == (2, 0)
    assert (given["TOKENS"] > 0).all()


def test_cached_rows_are_those_of_the_first_answer(served: str, texts: list[str]) -> None:
    """Texts that come again, alone and beside new ones."""
    first = ask(served, "splade", texts[:40])
    again = ask(served, "splade", texts[20:60])
    rows = [dense(given, small_models.VOCABULARY) for given in (first, again)]
    assert np.array_equal(rows[0][20:], rows[1][:20])
    assert first["TOKENS"][20:].tolist() == again["TOKENS"][:20].tolist()


def test_quality_record_names_ids(served: str, home: Settings) -> None:
    """FP32 records the share of texts with the same ids, and of the top 10; the config names the
    kind, and the size of the vocabulary as dims.
    """
    folder = version_folder(home.repository / "plain")
    record = json.loads((folder / "quality.json").read_text())
    assert record["same_ids"] >= record["bar"]["same_ids"] == 0.99
    assert record["top_10"] == 1
    written = model_config.read(home.repository / "plain" / "config.pbtxt")
    assert written.parameters["kind"].string_value == "sparse"
    assert written.parameters["dims"].string_value == "9000"
    assert [(entry.name, list(entry.dims)) for entry in written.output] == [
        ("SPARSE_IDS", [-1]), ("SPARSE_WEIGHTS", [-1]), ("TOKENS", [1]),
    ]  # fmt: skip
    assert [entry.name for entry in written.input] == ["TEXT", "INPUT_TYPE"]


@pytest.fixture(scope="module")
def exported(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of an exported form."""
    parent = tmp_path_factory.mktemp("exported")

    def export_form(name: str) -> Path:
        folder: Path = parent / name
        if not folder.exists():
            folder.mkdir()
            export.export(folders[name], ModelOptions(name, kind=KINDS.get(name)), folder)
        return folder

    return export_form


def shared_engine(folder: Path, cache: ResponseCache | None = None) -> SharedEngine:
    """The engine of an exported form, as the hosts make it."""
    facts = spec.load(folder)
    opened, _ = session.open_session(
        folder / session.FILE_NAME, [session.Accelerator("openvino")], max_tokens=facts.max_tokens
    )
    make_rows = text_rows(text.load(folder, facts))
    return SharedEngine(
        Scheduler(opened.run_outputs, opened.plan, 1, make_rows=make_rows), facts, cache
    )


def test_vocabulary_is_pooled_in_parts(exported: Callable[[str], Path]) -> None:
    """The logits of 4,096 tokens of the vocabulary are in memory at a time."""
    weights = rewrite.load(exported("plain") / session.FILE_NAME).graph.initializer
    widths = [entry.dims[1] for entry in weights if len(entry.dims) == 2 and entry.dims[0] == 64]
    assert sorted(width for width in widths if width > 128) == [9000 - 2 * 4096, 4096, 4096]


def test_bulk_keeps_ids_and_weights_alone(exported: Callable[[str], Path]) -> None:
    """Until a request of 256 texts is answered, no row of a whole vocabulary is kept of any; and
    what came again comes from the cache.
    """
    folder, cache = exported("plain"), ResponseCache(10_000_000)
    engine = shared_engine(folder, cache)
    bulk = corpus.check_texts(256)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    assert engine.submit(bulk, None, answers.put) == 0
    first = answers.get(timeout=60)
    kept = [entry.vector for entry in cache.get(bulk) if entry is not None]
    assert len(kept) == 256
    assert all(isinstance(row, SparseRow) and row.ids.base is None for row in kept)
    assert sum(row.nbytes for row in kept) < 256 * 9000 * 4 / 4
    assert engine.submit(bulk, None, answers.put) == 256
    again = answers.get(timeout=60)
    assert first.vectors.shape == (256, 0)
    assert np.array_equal(first.heads["SPARSE_IDS"], again.heads["SPARSE_IDS"])
    assert np.array_equal(first.heads["SPARSE_WEIGHTS"], again.heads["SPARSE_WEIGHTS"])
    engine.close()


@pytest.mark.parametrize("name", ["splade", "sums", "xlm-roberta", "auto-encoder"])
def test_nan_is_the_error_of_its_text_alone(
    name: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """A token whose embedding is NaN: the text that has it fails, with its place; another request
    of the same run does not.
    """
    folder = Path(shutil.copytree(exported(name), tmp_path / "nan"))
    graph = rewrite.load(folder / session.FILE_NAME)
    table = next(
        node.input[0]
        for node in graph.graph.node
        if node.op_type == "Gather" and node.input[1] == "input_ids"
    )
    entry = next(entry for entry in graph.graph.initializer if entry.name == table)
    values = numpy_helper.to_array(entry).copy()
    values[NAN_TOKEN] = np.nan
    entry.CopyFrom(numpy_helper.from_array(values, table))
    rewrite.save(graph, folder / session.FILE_NAME)
    facts = spec.load(folder)
    opened, _ = session.open_session(
        folder / session.FILE_NAME, [session.Accelerator("openvino")], max_tokens=facts.max_tokens
    )
    ids = [[2, 10, 11, 3], [2, NAN_TOKEN, 11, 12, 3], [2, 13, 3]]
    rows = opened.run_outputs(session.token_rows(text.Tokens(one, len(one)) for one in ids))
    with pytest.raises(NonFiniteVector) as raised:
        sparse.outputs(rows)
    assert raised.value.index == 1
    assert len(sparse.outputs([rows[0], rows[2]])["SPARSE_IDS"]) == 2


def test_lower_precisions_record_the_top_10(folders: dict[str, Path], home: Settings) -> None:
    """FP16 and INT8 are held to the cosines of texts; the layer that makes the logits is in INT8."""
    request = build_request(
        str(folders["splade"]),
        "low",
        precisions=("fp32", "fp16", "int8"),
        accepted=("fp16", "int8"),
    )
    assert build(request, home) == ["low", "low-fp16", "low-int8"]
    for suffix, mean_cosine, top_10 in (("fp16", 0.9999, 0.99), ("int8", 0.99, 0.85)):
        folder = version_folder(home.repository / f"low-{suffix}")
        record = json.loads((folder / "quality.json").read_text())
        assert record["mean_cosine"] >= mean_cosine
        assert record["top_10"] >= top_10
        assert record["bar"]["mean_cosine"] == towers.BARS[suffix].mean_cosine
    path = version_folder(home.repository / "low-int8-onnx") / session.FILE_NAME
    weights = [
        entry
        for entry in rewrite.load(path).graph.initializer
        if tuple(entry.dims) == (64, small_models.VOCABULARY)
    ]
    assert [entry.data_type for entry in weights] == [TensorProto.INT8]


def test_what_is_no_sparse_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """SparseEncoder would put random weights behind these; each is named instead."""

    def load(folder: Path, **options: Any) -> Any:
        return describe.load(folder, ModelOptions("m", **options))

    with pytest.raises(InvalidModel, match="BertModel, which has no logits of a vocabulary"):
        load(small_models.bert(tmp_path / "bert"), kind="sparse")
    with pytest.raises(InvalidModel, match="the modules Transformer, Pooling, Normalize"):
        load(small_models.like_minilm(tmp_path / "dense"), kind="sparse")
    with pytest.raises(InvalidModel, match="a weight for each token"):
        load(folders["roberta"], kind="dense")
    only_onnx = Path(shutil.copytree(folders["roberta"], tmp_path / "onnx"))
    (only_onnx / "model.safetensors").rename(only_onnx / "model.onnx")
    with pytest.raises(InvalidModel, match="no weights for PyTorch"):
        load(only_onnx)


def test_whatever_changes_weights_changes_the_space(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The kind, the pooling, and how many weights are kept."""

    def space(folder: Path, **options: Any) -> str:
        wanted = ModelOptions("m", **options)
        return describe.describe(describe.load(folder, wanted), folder, wanted).space

    def edited(name: str, file: str, **fields: object) -> Path:
        folder = Path(shutil.copytree(folders["roberta"], tmp_path / name))
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    pooling = "1_SpladePooling/config.json"
    spaces = [
        space(folders["plain"], kind="sparse"),
        space(folders["plain"], kind="dense"),
        space(folders["roberta"]),
        space(edited("sum", pooling, pooling_strategy="sum")),
        space(edited("log", pooling, activation_function="log1p_relu")),
        space(edited("few", "config_sentence_transformers.json", max_active_dims=8)),
    ]
    assert len(set(spaces)) == len(spaces)
