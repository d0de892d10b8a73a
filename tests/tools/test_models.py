"""Any model's folder, built and served by a real Triton, against sentence-transformers on it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forms
import numpy as np
import onnx
import pytest
import small_models
import torch
from conftest import free_options, version_folder
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer import modules as st
from tritonclient import grpc as triton_grpc

from halimede import Embedder
from halimede_engine import session
from halimede_ops import heads, spec, vectors
from halimede_ops.errors import BuildError, InvalidInput, InvalidModel, UntrustedCode
from halimede_tools.build import describe, model_config
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.plan import Fields, build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.build.towers import Engine, text_rows
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {name: form.make for name, form in forms.DENSE.items()}
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
        build(build_request(str(folder), name, precisions=("fp32",)), home)
    options = free_options()
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


@pytest.fixture(scope="module")
def served_in_steps(
    served: str, home: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of one Triton that serves the form with the most outputs as an ensemble's steps."""
    options = free_options(models=("bge-m3",), steps=True)
    run = tmp_path_factory.mktemp("steps")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"


@pytest.mark.parametrize("name", FORMS)
def test_served_vectors_are_sentence_transformers_own(
    name: str, served: str, folders: dict[str, Path], home: Settings, texts: list[str]
) -> None:
    """FP32 cosine ≥ 0.99999 for plain texts, queries and documents, at every width."""
    reference = describe.load(folders[name], ModelOptions(name))
    facts = spec.load(version_folder(home.repository / name))
    with Embedder(served, name, timeout_s=120) as embedder:
        for input_type in (None, "query", "document"):
            prompt = facts.prompt(input_type)
            expected = reference.encode(texts, prompt=prompt, show_progress_bar=False)
            for width in {min(width, facts.dims) for width in WIDTHS}:
                got = embedder.embed(texts, input_type=input_type, dimensions=width).vectors
                assert vectors.cosine(got, expected[:, :width]).min() >= 0.99999
            norms = np.linalg.norm(expected, axis=1)
            assert np.allclose(
                np.linalg.norm(embedder.embed(texts, input_type=input_type).vectors, axis=1),
                # CLIPModel normalises what sentence-transformers leaves as it is.
                1.0 if "clip" in name else norms,
                rtol=1e-3,
            )


def all_outputs(served: str, name: str, texts: list[str], *outputs: str) -> dict[str, np.ndarray]:
    """The named outputs of one request to an ensemble, by plain tritonclient."""
    with triton_grpc.InferenceServerClient(served) as client:
        tensor = triton_grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], np.object_))
        result = client.infer(name, [tensor])
        return {output: result.as_numpy(output) for output in outputs}


@pytest.mark.parametrize("server", ["served", "served_in_steps"])
def test_sparse_and_multi_vectors_come_from_the_same_pass(
    server: str, folders: dict[str, Path], texts: list[str], request: pytest.FixtureRequest
) -> None:
    """bge-m3's further heads equal their definition on transformers' own hidden states."""
    some = texts[32:48] + ["", "again and again and again"]
    folder = folders["bge-m3"]
    address = request.getfixturevalue(server)
    got = all_outputs(address, "bge-m3", some, "SPARSE_IDS", "SPARSE_WEIGHTS", "MULTI_VECTORS")
    model = describe.load(folder, ModelOptions("bge-m3"))
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
    build(build_request(str(folders["mpnet"]), "mpnet", **options), home)
    options = free_options()
    (tmp_path / "run").mkdir()
    with wheel.serve(home.repository, home.python_backend, tmp_path / "run", options):
        address = f"127.0.0.1:{options.grpc_port}"
        got = all_outputs(
            address, "mpnet", ["a longer text of some words", "a"], "TOKEN_EMBEDDINGS"
        )
    model = describe.load(folders["mpnet"], ModelOptions("mpnet"))
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
        expected = describe.load(folder, ModelOptions(name)).encode(texts)
        assert got.shape == expected.shape
        assert vectors.cosine(got, expected).min() >= 0.99999


@pytest.mark.parametrize("name", ["minilm", "bge", "codebert", "bge-m3", "mpnet", "qwen3"])
def test_texts_that_share_rows(
    name: str, folders: dict[str, Path], tmp_path: Path, texts: list[str]
) -> None:
    """BERT's and RoBERTa's kin take several texts a row, others one; the vectors are those of
    each text alone.
    """
    engine = exported(folders[name], tmp_path / "onnx")
    rows = [row for row in engine.rows(texts) if row.length <= 64]
    told: list[int] = []
    opened, _ = session.open_session(tmp_path / "onnx" / session.FILE_NAME, on_run=told.append)
    together = opened.run_together(rows)
    shared = told[0] < 1.3 * sum(row.length for row in rows)
    assert shared == (name not in ("mpnet", "qwen3"))
    alone = np.concatenate([opened.run_together([row]) for row in rows])
    assert vectors.cosine(together, alone).min() >= 0.99999


def test_layer_norm_and_default_prompt(tmp_path: Path, texts: list[str]) -> None:
    """A LayerNorm module and a default prompt act as in sentence-transformers."""
    folder = small_models.sentence_transformer(
        small_models.bert, tmp_path / "model", st.Pooling(64, "mean"), st.LayerNorm(64),
        max_tokens=64, prompts={"query": "find: ", "passage": "text: "}, default_prompt="query",
    )  # fmt: skip
    engine = exported(folder, tmp_path / "onnx")
    expected = describe.load(folder, ModelOptions("m")).encode(texts)
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
    expected = describe.load(folders["bge"], ModelOptions("bge")).encode(texts)
    assert vectors.cosine(engine.embed(texts), expected).min() >= 0.99999


def exported(source: Path, folder: Path) -> Engine:
    """The engine of a folder that was exported, and nothing else."""
    from halimede_tools.build.export import export

    folder.mkdir()
    export(source, ModelOptions("m"), folder)
    facts = spec.load(folder)
    return Engine(folder / session.FILE_NAME, text_rows(folder, facts), facts)


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A sentence-transformers folder to break."""
    return Path(shutil.copytree(folders["minilm"], tmp_path / "copied"))


def refused(folder: Path, error: type[Exception], match: str, settings: Settings) -> None:
    """Building the folder gives this error, and the repository stays as it was."""
    before = sorted(settings.repository.rglob("*"))
    with pytest.raises(error, match=match):
        build(build_request(str(folder), "broken", precisions=("fp32",)), settings)
    assert sorted(settings.repository.rglob("*")) == before
    assert not list((settings.models / "broken").glob("*.part"))


def test_truncated_weights(copied: Path, home: Settings) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(copied, InvalidModel, "damaged", home)


def test_folder_that_is_not_there(home: Settings, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", InvalidModel, "no such folder", home)


def test_folder_that_is_no_model(home: Settings, tmp_path: Path) -> None:
    refused(tmp_path, InvalidModel, "neither config.json nor modules.json", home)


def test_unknown_module_is_named(copied: Path, home: Settings) -> None:
    """A module that cannot be exported is refused by its name."""
    modules = json.loads((copied / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.models.CNN"
    (copied / "modules.json").write_text(json.dumps(modules))
    refused(copied, InvalidModel, "module CNN", home)


def test_own_code_runs_only_when_trusted(copied: Path, home: Settings) -> None:
    """A folder that names Python code is refused; with the opt-in it builds, and is served
    without that code.
    """
    (copied / "modeling_own.py").write_text(
        "from transformers import BertModel\n\n\nclass OwnModel(BertModel):\n    pass\n"
    )
    configuration = json.loads((copied / "config.json").read_text())
    configuration["auto_map"] = {"AutoModel": "modeling_own.OwnModel"}
    (copied / "config.json").write_text(json.dumps(configuration))
    refused(copied, UntrustedCode, "--trust-remote-code", home)
    wanted = build_request(str(copied), "own", precisions=("fp32",), trust_remote_code=True)
    assert build(wanted, home) == ["own"]


def test_tokenizer_without_padding_token(copied: Path, home: Settings, texts: list[str]) -> None:
    """Padding decides no vector: another special token stands in, and vectors stay the same."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((copied / name).read_text())
        fields.pop("pad_token", None)
        (copied / name).write_text(json.dumps(fields))
    assert build(build_request(str(copied), "padless", precisions=("fp32",)), home) == ["padless"]


def test_tokenizer_that_nothing_can_pad(copied: Path, home: Settings) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((copied / name).read_text())
        for token in ("pad", "eos", "sep", "unk"):
            fields.pop(f"{token}_token", None)
        (copied / name).write_text(json.dumps(fields))
    refused(copied, InvalidModel, "no padding token", home)


def test_model_above_the_memory_limit(copied: Path, home: Settings) -> None:
    """The error says what is needed and what the limit is; nothing is loaded."""
    small = home.model_copy(update={"memory_limit_gib": 0.001})
    refused(copied, BuildError, "the limit is 0.0 GiB", small)


def test_full_disk(copied: Path, home: Settings, tmp_path: Path) -> None:
    """A disk that fills up while a step is made gives one clear error; with space it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        full = home.model_copy(update={"home": disk})
        refused(copied, BuildError, "the disk is full", full)
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert build(build_request(str(copied), "broken", precisions=("fp32",)), full) == ["broken"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_token_limit_of_a_build(copied: Path, home: Settings) -> None:
    """A lower limit is served; one above the model's is refused."""
    build(build_request(str(copied), "short", precisions=("fp32",), max_tokens=32), home)
    assert spec.load(version_folder(home.repository / "short")).max_tokens == 32
    with pytest.raises(InvalidModel, match="takes 1 to 256 tokens"):
        build(build_request(str(copied), "long", precisions=("fp32",), max_tokens=1000), home)


def test_wrong_options_are_named() -> None:
    with pytest.raises(InvalidInput, match="fp32, fp16, int8"):
        build_request("all-MiniLM-L6-v2", precisions=("int4",))
    with pytest.raises(InvalidInput, match="cpu, cuda, tensorrt"):
        build_request("all-MiniLM-L6-v2", device="npu")
    with pytest.raises(InvalidInput, match="letters a to z, digits"):
        build_request("all-MiniLM-L6-v2", name="../up")


def test_outliers_go_their_own_way_in_fp32(copied: Path, tmp_path: Path) -> None:
    """A channel of outliers is found, and without it the graph gives the same vectors; INT8 then
    leaves nothing else in FP32.
    """
    from halimede_tools.build import int8
    from halimede_tools.build.graph import activations, outliers, rewrite

    state = load_file(copied / "model.safetensors")
    state["encoder.layer.1.intermediate.dense.bias"][3] = 300.0
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    engine = exported(copied, tmp_path / "onnx")
    texts = corpus.calibration_texts(24)
    expected = engine.embed(texts)
    path = tmp_path / "onnx" / session.FILE_NAME
    model = rewrite.load(path)
    feeds = [int8.feed(row) for row in engine.rows(texts)]
    observed = activations.of_matmuls(model, feeds)
    found = {name: outliers.channels(activation) for name, activation in observed.items()}
    [name] = [name for name, some in found.items() if 3 in some]
    assert name.endswith("layer.1/output/dense/MatMul")
    assert outliers.take_apart(model, {name: found[name]}) == [name]
    assert activations.of_matmuls(model, feeds)[name].high.max() < 10
    rewrite.save(model, path)
    opened, _ = session.open_session(path)
    assert vectors.cosine(opened.run(engine.rows(texts)), expected).min() >= 0.99999


def test_smoothing_changes_no_vector(copied: Path, tmp_path: Path) -> None:
    """A smoothed graph gives the same vectors, from inputs of MatMuls with more even ranges."""
    from halimede_tools.build import int8
    from halimede_tools.build.graph import activations, rewrite, smoothing

    engine = exported(copied, tmp_path / "onnx")
    texts = corpus.calibration_texts()[::20]
    expected = engine.embed(texts)
    path = tmp_path / "onnx" / session.FILE_NAME
    model = rewrite.load(path)
    feeds = [int8.feed(row) for row in engine.rows(texts)]
    before = activations.of_matmuls(model, feeds)
    smoothed = smoothing.smooth(model, before)
    after = activations.of_matmuls(model, feeds)
    for name, activation in after.items():
        assert np.allclose(activation.high, smoothed[name].high, rtol=1e-3, atol=1e-4)
    uneven, even = (
        np.median([one.high.std() / one.high.mean() for one in observed.values()])
        for observed in (before, after)
    )
    assert even < uneven
    rewrite.save(model, path)
    opened, _ = session.open_session(path)
    assert vectors.cosine(opened.run(engine.rows(texts)), expected).min() >= 0.9999


def test_int8_weights_have_no_zero_points_of_0(source: Path) -> None:
    """Nothing is subtracted from a weight where its zero point is 0."""
    from onnx import numpy_helper

    from halimede_tools.build.graph import rewrite

    made = rewrite.load(source.parent / "int8" / session.FILE_NAME)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in made.graph.initializer}
    zeros = [
        [constants[zero].any() for zero in node.input[2:]]
        for node in made.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    ]
    assert len(zeros) > 30
    assert all(all(some) for some in zeros)


def test_constants_of_branches_within_branches_are_kept() -> None:
    """And a constant that nothing uses is dropped."""
    from onnx import TensorProto, helper, numpy_helper

    from halimede_tools.build.graph import rewrite

    def graph(node: onnx.NodeProto, *outer: object) -> onnx.GraphProto:
        [output] = node.output
        given = helper.make_tensor_value_info(output, TensorProto.FLOAT, [1])
        return helper.make_graph([node], "graph", *(outer or ([],)), [given])

    def branch(name: str, output: str) -> onnx.GraphProto:
        return graph(helper.make_node("Identity", [name], [output]))

    inner = helper.make_node(
        "If", ["c"], ["inner"], then_branch=branch("deep", "a"), else_branch=branch("flat", "b")
    )
    outer = helper.make_node(
        "If", ["c"], ["y"], then_branch=graph(inner), else_branch=branch("flat", "d")
    )
    model = helper.make_model(
        graph(outer, [helper.make_tensor_value_info("c", TensorProto.BOOL, [1])])
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ones(1, np.float32), name) for name in ("deep", "flat", "unused")
    )
    rewrite.drop_unused_constants(model)
    assert [entry.name for entry in model.graph.initializer] == ["deep", "flat"]


def test_int8_looks_rows_up_before_they_are_dequantised(source: Path) -> None:
    """No table of embeddings is dequantised whole, and a row's values are what they were, to the
    bit: of tables with a scale a row, and with one for all.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from halimede_tools.build.graph import rewrite

    made = rewrite.load(source.parent / "int8" / session.FILE_NAME)
    tables = {entry.name for entry in made.graph.initializer if "embeddings" in entry.name}
    whole = [node for node in made.graph.node if node.op_type == "DequantizeLinear"]
    assert not [node for node in whole if tables & set(node.input[:1])]

    rng = np.random.default_rng(1)
    ids = np.array([[3, 0], [49, 3]])
    for scale, axis in ((rng.random(50), {"axis": 0}), (np.array(0.3), {})):
        constants = {
            "table": rng.integers(-127, 127, (50, 8)).astype(np.int8),
            "scale": scale.astype(np.float32),
            "zero": np.zeros(scale.shape, np.int8),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["table", "scale", "zero"], ["whole"], **axis),
            helper.make_node("Gather", ["whole", "ids"], ["rows"]),
        ]
        model = helper.make_model(
            helper.make_graph(
                nodes,
                "lookup",
                [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 2])],
                [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, 2, 8])],
                [numpy_helper.from_array(value, name) for name, value in constants.items()],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=10,
        )
        got = []
        for _ in range(2):
            opened = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            got.append(opened.run(None, {"ids": ids})[0])
            rewrite.dequantise_what_is_looked_up(model)
        assert model.graph.node[-1].op_type == "Mul"
        assert got[0].tobytes() == got[1].tobytes()


def test_precision_below_its_bar_needs_consent(
    copied: Path, home: Settings, capfd: pytest.CaptureFixture
) -> None:
    """It is left out and named; with consent it is served, and its config says what it misses."""
    wanted = {"precisions": ("fp32", "fp16")}
    # The graph weighs as much as the weights of so small a model: FP16 misses its size.
    assert build(build_request(str(copied), "coarse", **wanted), home) == ["coarse"]
    assert "coarse in fp16 is not published: size_ratio" in capfd.readouterr().err
    names = build(build_request(str(copied), "coarse", **wanted, accepted=("fp16",)), home)
    assert names == ["coarse", "coarse-fp16"]
    parameters = model_config.read(home.repository / "coarse-fp16" / "config.pbtxt").parameters
    assert "size_ratio" in parameters["below_bar"].string_value


@pytest.mark.parametrize("form", ["minilm", "clip"])
def test_precisions_are_published_one_at_a_time(
    form: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A new model is written after each precision, FP32 first, and is in the end, byte for byte,
    what it is when it is written at once. A new version of a model that is served is written once.
    """
    staged = Settings(home=tmp_path / "home", repository=tmp_path / "staged")
    whole = Settings(home=tmp_path / "home", repository=tmp_path / "whole")
    options: Fields = {"precisions": ("fp32", "fp16"), "accepted": ("fp16",)}
    towers = ("", "-image") if form == "clip" else ("",)
    first, second = ([f"m{tower}{suffix}" for tower in towers] for suffix in ("", "-fp16"))
    calls: list[tuple[list[str], set[str]]] = []

    def published(names: list[str]) -> None:
        configs = staged.repository.glob("*/config.pbtxt")
        served = {path.parent.name for path in configs} & {*first, *second}
        calls.append((names, served))

    request = build_request(str(folders[form]), "m", **options)
    names = build(request, staged, published=published)
    assert calls == [(first, {*first}), (second, {*first, *second})]
    assert build(request, whole) == names
    assert contents(staged.repository) == contents(whole.repository)

    calls.clear()
    shorter = build_request(str(folders[form]), "m", max_tokens=32, **options)
    assert build(shorter, staged, published=published) == names
    assert calls == [(names, {*first, *second})]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_another_space_leaves_no_old_precision_behind(copied: Path, home: Settings) -> None:
    """When a model changes, precisions that are not built again go: their tokenizer is gone."""
    wanted = {"precisions": ("fp32", "fp16"), "accepted": ("fp16",)}
    build(build_request(str(copied), "moving", **wanted), home)
    build(build_request(str(copied), "moving", precisions=("fp32",)), home)
    assert (home.repository / "moving-fp16").exists()
    build(build_request(str(copied), "moving", precisions=("fp32",), max_tokens=64), home)
    assert not (home.repository / "moving-fp16").exists()
    assert not (home.repository / "moving-fp16-onnx").exists()
    assert (home.repository / "moving").exists()
