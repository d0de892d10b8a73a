"""The space covers everything that changes a vector: each is changed in turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import small_models
import torch
from conftest import MODEL
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer import modules as st

from halimede_ops.spec import ModelSpec
from halimede_tools.build import describe, repository
from halimede_tools.build.describe import ModelOptions

Change = Callable[[Path], None]


def facts(folder: Path, **options: Any) -> ModelSpec:
    """The spec that a build of the folder would write."""
    wanted = ModelOptions("m", **options)
    return describe.describe(describe.load(folder, wanted), folder, wanted)


def version(spec: ModelSpec) -> int:
    return repository.Built(spec, Path("tokenizer.json")).version("fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with two Dense layers, one with ONNX and external weights alone, a CLIP, and one
    with further heads.
    """
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    parent = tmp_path_factory.mktemp("folders")
    layers = [small_models.dense(64, 64, torch.nn.Tanh()) for _ in range(2)]
    torch.nn.init.eye_(layers[1].linear.weight)
    found = {
        "dense": small_models.sentence_transformer(
            small_models.bert, parent / "dense", st.Pooling(64, "mean"), *layers,
            prompts={"query": "find: "},
        ),
        "clip": small_models.clip(parent / "clip"),
        "heads": small_models.like_bge_m3(parent / "heads"),
        "onnx": small_models.like_bge(parent / "onnx"),
    }  # fmt: skip
    ready = ORTModelForFeatureExtraction.from_pretrained(found["onnx"], export=True)
    ready.save_pretrained(found["onnx"])
    (found["onnx"] / "model.safetensors").unlink()
    graph = onnx.load(found["onnx"] / "model.onnx")
    onnx.save(
        graph, found["onnx"] / "model.onnx", save_as_external_data=True, location="weights.bin"
    )
    return found


def edited(file: str, **fields: object) -> Change:
    """Sets keys of a JSON file."""

    def edit(folder: Path) -> None:
        path = folder / file
        content = (json.loads(path.read_text()) if path.exists() else {}) | fields
        path.write_text(json.dumps(content))

    return edit


def other_weights(file: str) -> Change:
    def change(folder: Path) -> None:
        state = load_file(folder / file)
        first = sorted(state)[0]
        state[first] = state[first] + 1
        save_file(state, folder / file, metadata={"format": "pt"})

    return change


def other_bytes(file: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def modules_in_another_order(folder: Path) -> None:
    """The two Dense layers trade their places, but not their folders."""
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    first, second = (modules[-2]["path"], modules[-1]["path"])
    modules[-2]["path"], modules[-1]["path"] = second, first
    path.write_text(json.dumps(modules))


def other_token(folder: Path) -> None:
    """Two tokens of the vocabulary trade their ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def without_tokenizer_json(change: Change) -> Change:
    """Leaves BERT's vocabulary as the only tokenizer file, and changes it."""

    def edit(folder: Path) -> None:
        only_vocabulary(folder)
        change(folder)

    return edit


def only_vocabulary(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    (folder / "tokenizer.json").unlink()
    edited("tokenizer_config.json", tokenizer_class="BertTokenizer")(folder)


def other_vocabulary(folder: Path) -> None:
    path = folder / "vocab.txt"
    words = path.read_text().split("\n")
    path.write_text("\n".join([*words[:-2], words[-1], words[-2]]))


def other_code(folder: Path) -> None:
    edited("config.json", auto_map={"AutoModel": "modeling_own.OwnModel"})(folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import BertModel\n\n\nclass OwnModel(BertModel):\n    pass\n"
    )


BERT = {"tokenizer_class": "BertTokenizer"}
CHANGES: dict[str, tuple[str, Change]] = {
    "weights": ("dense", other_weights("model.safetensors")),
    "weights of a Dense": ("dense", other_weights("2_Dense/model.safetensors")),
    "activation of a Dense": (
        "dense",
        edited("2_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"),
    ),
    "pooling": ("dense", edited("1_Pooling/config.json", pooling_mode="cls")),
    "order of modules": ("dense", modules_in_another_order),
    "model's config": ("dense", edited("config.json", hidden_act="relu")),
    "prompts": (
        "dense",
        edited("config_sentence_transformers.json", prompts={"query": "search: "}),
    ),
    "default prompt": (
        "dense",
        edited("config_sentence_transformers.json", default_prompt_name="query"),
    ),
    "token limit": ("dense", edited("tokenizer_config.json", model_max_length=64)),
    "tokenizer.json": ("dense", other_token),
    "do_lower_case of the tokenizer": (
        "dense",
        edited("tokenizer_config.json", do_lower_case=False, **BERT),
    ),
    "strip_accents": ("dense", edited("tokenizer_config.json", strip_accents=False, **BERT)),
    "tokenize_chinese_chars": (
        "dense",
        edited("tokenizer_config.json", tokenize_chinese_chars=False, **BERT),
    ),
    "special tokens": (
        "dense",
        edited("tokenizer_config.json", additional_special_tokens=["the"]),
    ),
    "truncation_side": ("dense", edited("tokenizer_config.json", truncation_side="left")),
    "do_lower_case of the transformer": (
        "dense",
        edited("sentence_bert_config.json", do_lower_case=True),
    ),
    "vocab.txt": ("dense", without_tokenizer_json(other_vocabulary)),
    "a head's weights": ("heads", other_bytes("sparse_linear.pt")),
    "external weights": ("onnx", other_bytes("weights.bin")),
    "preprocessor": ("clip", edited("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_vector_changes_space_and_version(
    change: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, edit = CHANGES[change]
    folder = Path(shutil.copytree(folders[form], tmp_path / form))
    if change == "vocab.txt":
        only_vocabulary(folder)
    before = facts(folder)
    if change == "vocab.txt":
        shutil.rmtree(folder)
        shutil.copytree(folders[form], folder)
    if "head" in change:  # a damaged pickle: its bytes are read, not its values
        monkeypatch.setattr(describe, "head_weights", lambda _: {"weight": torch.zeros(64, 64)})
    edit(folder)
    after = facts(folder)
    assert after.space != before.space
    assert version(after) != version(before)


def test_code_of_the_folder_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["dense"], tmp_path / "own"))
    other_code(folder)
    before = facts(folder, trust_remote_code=True)
    with (folder / "modeling_own.py").open("a") as code:
        code.write("\n\nSCALE = 2\n")
    assert facts(folder, trust_remote_code=True).space != before.space


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "README.md").write_text("changed") and None,
        lambda folder: (folder / "train.py").write_text("print()") and None,
        edited("config.json", transformers_version="9.9", _name_or_path="elsewhere"),
        edited("tokenizer_config.json", name_or_path="elsewhere"),
        edited("sentence_bert_config.json", do_lower_case=False),
    ],
    ids=["README", "script", "config's origin", "tokenizer's origin", "default"],
)
def test_what_changes_no_vector_changes_no_space(
    change: Change, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["dense"], tmp_path / "dense"))
    before = facts(folder).space
    change(folder)
    assert facts(folder).space == before


def test_the_default_models_space_stays(source: Path) -> None:
    """Users have stored vectors of it."""
    assert facts(source).space == SPACE
    assert MODEL in str(source)


SPACE = "c64c1b94e17c49b9"
