"""The commonest forms of a model's folder, and the damaged and odd ones: each is built right, or
refused in words that name the cause.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import small_models
import torch
import transformers as hf
from conftest import free_options, version_folder
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer import modules as st
from tokenizers import Tokenizer

from halimede import Embedder
from halimede_engine.engine import SharedEngine
from halimede_engine.scheduler import Scheduler
from halimede_engine.session import open_session
from halimede_ops import spec, text, vectors
from halimede_ops.errors import BuildError, HalimedeError, InvalidText
from halimede_repository import configs
from halimede_tools.build import describe
from halimede_tools.build.checks import traced
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.export import export
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.build.towers import Engine, text_rows
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def left_padding_with_cls(folder: Path) -> Path:
    small_models.like_bge(folder)
    edit(folder / "tokenizer_config.json", padding_side="left")
    return folder


def left_truncation(folder: Path) -> Path:
    small_models.like_minilm(folder)
    edit(folder / "tokenizer_config.json", truncation_side="left")
    edit(folder / "sentence_bert_config.json", max_seq_length=32)
    return folder


def empty_default_prompt(folder: Path) -> Path:
    return small_models.sentence_transformer(
        small_models.bert, folder, st.Pooling(64, "mean"),
        prompts={"passage": "", "query": "query: "}, default_prompt="passage",
    )  # fmt: skip


def truncated_dimensions(folder: Path) -> Path:
    small_models.like_minilm(folder)
    edit(folder / "config_sentence_transformers.json", truncate_dim=32)
    return folder


def split_special_tokens(folder: Path) -> Path:
    small_models.like_minilm(folder)
    edit(folder / "tokenizer_config.json", split_special_tokens=True)
    return folder


def limit_of_processing_kwargs(folder: Path) -> Path:
    small_models.like_minilm(folder)
    edit(
        folder / "sentence_bert_config.json",
        processing_kwargs={"text": {"max_length": 16, "truncation": True}},
    )
    return folder


def gpt2(folder: Path) -> Path:
    """GPT-2, as SGPT: its tokenizer adds no special token, so an empty text has no token."""
    fields = json.loads(small_models.byte_level("qwen").to_str()) | {"post_processor": None}
    config = hf.GPT2Config(
        vocab_size=small_models.VOCABULARY, n_positions=256, n_embd=64, n_layer=2, n_head=4,
        initializer_range=0.2, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    plain = small_models.save(
        folder.with_name(folder.name + "-plain"),
        small_models.build(hf.GPT2Model, config),
        Tokenizer.from_str(json.dumps(fields)), 256, pad_token="<|endoftext|>",
        eos_token="<|endoftext|>", **small_models.TEXT_INPUTS,
    )  # fmt: skip
    return small_models.sentence_transformer(
        lambda _: plain, folder, st.Pooling(64, "weightedmean")
    )


def gpt2_with_token_types(folder: Path) -> Path:
    """GPT-2 adds the vector of a token's type to that of the token; its tokenizer gives type 0."""
    gpt2(folder)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    edit(folder / "tokenizer_config.json", model_input_names=names)
    return folder


def index_of_another_format(folder: Path) -> Path:
    """Weights that are whole, beside an index of weights that were not fetched."""
    small_models.like_minilm(folder)
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def limit_of_common_processing_kwargs(folder: Path) -> Path:
    """`common` goes before `text`."""
    small_models.like_minilm(folder)
    edit(
        folder / "sentence_bert_config.json",
        processing_kwargs={
            "text": {"max_length": 64},
            "common": {"max_length": 12, "padding_side": "left"},
        },
    )
    return folder


def only_onnx(folder: Path, name: str = "model.onnx") -> Path:
    """A BERT as a graph, without PyTorch weights."""
    small_models.bert(folder)
    model = hf.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {key: {0: "batch", 1: "tokens"} for key in (*names, "last_hidden_state")}
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    torch.onnx.export(
        Hidden(model), (torch.ones(2, 8, dtype=torch.int64),) * 3, str(path), input_names=names,
        output_names=["last_hidden_state"], dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    return folder


class Hidden(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any, types: Any) -> Any:
        return self.model(ids, mask, types).last_hidden_state


class Vectors(Hidden):
    def forward(self, ids: Any, mask: Any) -> Any:
        return self.model({"input_ids": ids, "attention_mask": mask})[spec.POOLED]


def onnx_behind_links(folder: Path) -> Path:
    """A graph with weights beside it, in a cache of links as Hugging Face keeps it."""
    only_onnx(folder)
    model = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data",
        size_threshold=100,
    )  # fmt: skip
    blobs = folder.with_name(folder.name + "-blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    return folder


def onnx_and_dense(folder: Path) -> Path:
    """A graph, pooling, and a Dense layer with PyTorch weights."""
    only_onnx(folder)
    modules = []
    for index, (name, module) in enumerate(
        {"": None, "1_Pooling": st.Pooling(64, "mean"),
         "2_Dense": small_models.dense(64, 32, torch.nn.Tanh())}.items()
    ):  # fmt: skip
        kind = name.partition("_")[2] or "Transformer"
        modules.append(
            {"idx": index, "name": str(index), "path": name,
             "type": f"sentence_transformers.models.{kind}"}
        )  # fmt: skip
        if module is not None:
            (folder / name).mkdir()
            module.save(str(folder / name))
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


BUILT: dict[str, Callable[[Path], Path]] = {
    "left padding, CLS": left_padding_with_cls,
    "left truncation": left_truncation,
    "empty default prompt": empty_default_prompt,
    "truncate_dim": truncated_dimensions,
    "split_special_tokens": split_special_tokens,
    "processing_kwargs": limit_of_processing_kwargs,
    "processing_kwargs, common": limit_of_common_processing_kwargs,
    "index of another format": index_of_another_format,
    "no special tokens": gpt2,
    "ONNX alone": only_onnx,
    "ONNX behind links": onnx_behind_links,
    "ONNX and Dense": onnx_and_dense,
}


def own_activation(folder: Path) -> None:
    small_models.like_distiluse(folder)
    edit(next(folder.glob("*Dense/config.json")), activation_function="theirs.Activation")


def added_token(folder: Path) -> None:
    small_models.like_minilm(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["anothertoken"])
    tokenizer.save_pretrained(folder)


def wrong_width(folder: Path) -> None:
    small_models.like_minilm(folder)
    path = next(folder.glob("*Pooling/config.json"))
    [name] = [key for key in json.loads(path.read_text()) if "dimension" in key]
    edit(path, **{name: 32})


def wrong_dense(folder: Path) -> None:
    small_models.like_distiluse(folder)
    path = next(folder.glob("*Dense/config.json"))
    edit(path, in_features=48)
    weights = path.with_name("model.safetensors")
    tensors = load_file(weights)
    tensors["linear.weight"] = tensors["linear.weight"][:, :48].contiguous()
    save_file(tensors, weights)


def cut_weights(folder: Path) -> None:
    small_models.like_minilm(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_config(folder: Path) -> None:
    small_models.bert(folder)
    (folder / "config.json").write_text("{")


def missing_shard(folder: Path) -> None:
    small_models.bert(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = dict(list(tensors.items())[:5])
    save_file(first, folder / "model-00001-of-00002.safetensors")
    names = {True: "model-00001-of-00002.safetensors", False: "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": {key: names[key in first] for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unknown_architecture(folder: Path) -> None:
    small_models.bert(folder)
    edit(folder / "config.json", model_type="frobnicate")


def weights_of(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        small_models.bert(folder)
        (folder / "model.safetensors").rename(folder / name)

    return make


def adapter(folder: Path) -> None:
    folder.mkdir()
    edit_new = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(edit_new))


def adapter_beside_weights(folder: Path) -> None:
    small_models.bert(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


def sentencepiece_alone(folder: Path) -> None:
    small_models.xlm_roberta(folder)
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="XLMRobertaTokenizer")
    (folder / "sentencepiece.bpe.model").write_bytes(b"a model")


def without_tokenizer(folder: Path) -> None:
    small_models.bert(folder)
    for path in folder.glob("*token*"):
        path.unlink()


def fnet(folder: Path) -> None:
    """FNet mixes all tokens, padding included."""
    sizes = {key: size for key, size in small_models.SIZES.items() if "heads" not in key}
    config = hf.FNetConfig(vocab_size=small_models.VOCABULARY, max_position_embeddings=512, **sizes)
    small_models.save(
        folder, small_models.build(hf.FNetModel, config), small_models.wordpiece(), 512,
        model_input_names=["input_ids", "token_type_ids"], **small_models.BERT_TOKENS,
    )  # fmt: skip


def types_that_are_not_taken(folder: Path) -> None:
    small_models.distilbert(folder)
    edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids"])


def chat_template(folder: Path) -> None:
    small_models.qwen3(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def pointer(folder: Path) -> None:
    small_models.bert(folder)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def cut_pickle(folder: Path) -> None:
    small_models.bert(folder)
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:-1000])


def missing_weights(folder: Path) -> None:
    """A checkpoint without one of the layers."""
    small_models.bert(folder)
    path = folder / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(path).items() if "layer.1." not in key}
    save_file(kept, path, metadata={"format": "pt"})


def other_processing_kwargs(folder: Path) -> None:
    small_models.like_minilm(folder)
    edit(
        folder / "sentence_bert_config.json",
        processing_kwargs={"text": {"add_special_tokens": False}},
    )


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "activation of its own": (own_activation, "an activation that is not of torch"),
    "id beyond the table": (added_token, "ids up to 1,500; its table has vectors of 0 to 1,499"),
    "wrong width": (wrong_width, "gives vectors of 64 dimensions; its modules' configs say 32"),
    "wrong Dense": (wrong_dense, "the sizes of its modules do not fit together"),
    "cut weights": (cut_weights, "is damaged: model.safetensors, of .* bytes"),
    "cut config": (cut_config, "config.json of the model is missing or not JSON"),
    "missing shard": (missing_shard, "it lacks model-00002-of-00002.safetensors, which"),
    "unknown architecture": (unknown_architecture, "'frobnicate', which transformers 4.*not know"),
    "TensorFlow": (weights_of("tf_model.h5"), r"TensorFlow weights alone .*from_tf=True"),
    "Flax": (weights_of("flax_model.msgpack"), r"Flax weights alone .*from_flax=True"),
    "GGUF": (weights_of("model-q8_0.gguf"), "GGUF weights alone .*Give the folder"),
    "OpenVINO": (weights_of("openvino_model.xml"), "OpenVINO weights alone"),
    "no weights": (weights_of("something.else"), "neither PyTorch weights nor a model.onnx"),
    "quantised ONNX": (
        lambda folder: only_onnx(folder, "onnx/model_quantized.onnx"),
        "has onnx/model_quantized.onnx, and neither PyTorch weights nor a model.onnx",
    ),
    "adapter": (adapter, r"a PEFT adapter of owner/base\. Merge it first"),
    "adapter beside weights": (adapter_beside_weights, r"a PEFT adapter of owner/base"),
    "sentencepiece": (sentencepiece_alone, "pip install sentencepiece"),
    "no tokenizer": (without_tokenizer, "has no tokenizer: none of tokenizer.json"),
    "FNet": (fnet, "cannot be traced .*because fnet takes no attention_mask"),
    "types that are not taken": (types_that_are_not_taken, "Set model_input_names to"),
    "chat template": (chat_template, "has a chat template, and sentence-transformers puts every"),
    "pointer of Git LFS": (pointer, "is a pointer of Git LFS .* Run `git lfs pull`"),
    "cut pickle": (cut_pickle, "is damaged: pytorch_model.bin, of .* bytes"),
    "missing weights": (missing_weights, "its weights lack encoder.layer.1.* and 13 more, which a"),
    "processing_kwargs": (other_processing_kwargs, "processing_kwargs add_special_tokens for"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("forms")
    return Settings(home=folder / "home", repository=folder / "repository")


def built(make: Callable[[Path], Path], home: Settings, folder: Path) -> dict[str, Any]:
    """The quality record of the folder's FP32 model, which is built as `m`."""
    build(build_request(str(make(folder)), "m", precisions=("fp32",)), home)
    record = (version_folder(home.repository / "m") / "quality.json").read_text()
    return json.loads(record)


@pytest.mark.parametrize("form", BUILT)
def test_the_form_is_built_as_sentence_transformers_reads_it(
    form: str, home: Settings, tmp_path: Path
) -> None:
    """Lowest cosine ≥ 0.99999 over 600 texts: queries, long ones, odd ones."""
    record = built(BUILT[form], home, tmp_path / "m")
    assert record["min_cosine"] >= 0.99999
    assert record["missed"] == []


@pytest.mark.parametrize("form", REFUSED)
def test_the_form_is_refused_by_its_cause(form: str, home: Settings, tmp_path: Path) -> None:
    """One sentence says what was found; "damaged" is said of damage alone; no path is in it."""
    make, words = REFUSED[form]
    make(tmp_path / "m")
    with pytest.raises(HalimedeError, match=words) as refused:
        build(build_request(str(tmp_path / "m"), "m", precisions=("fp32",)), home)
    assert ("damaged" in str(refused.value)) == (form in ("cut weights", "cut pickle"))
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("make", [gpt2_with_token_types, small_models.xlnet])
def test_token_types_that_change_a_vector_are_given(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """The graph takes them, and the tokenizer makes them: cosine ≥ 0.99999."""
    folder, options = make(tmp_path / "m"), ModelOptions("m", max_tokens=64)
    (tmp_path / "onnx").mkdir()
    export(folder, options, tmp_path / "onnx")
    facts = spec.load(tmp_path / "onnx")
    assert facts.token_types
    engine = Engine(tmp_path / "onnx" / "model.onnx", text_rows(tmp_path / "onnx", facts), facts)
    texts = [value for value in corpus.check_texts()[:60] if value]
    expected = describe.load(folder, options).encode(texts, show_progress_bar=False)
    assert vectors.cosine(engine.embed(texts), expected).min() >= 0.99999


def test_a_graph_of_the_traced_shape_alone_is_refused(tmp_path: Path) -> None:
    """A graph is run once at other shapes than the one that was traced."""
    options = ModelOptions("m")
    model = describe.load(small_models.like_minilm(tmp_path / "m"), options)
    ones = torch.ones(2, 8, dtype=torch.int64)
    torch.onnx.export(
        Vectors(model), (ones, ones), str(tmp_path / "model.onnx"), output_names=[spec.POOLED],
        input_names=["input_ids", "attention_mask"], opset_version=17, dynamo=False,
    )  # fmt: skip
    opened = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match="the code of bert computes with the numbers of texts"):
        traced.check(opened, model, "m")


def test_a_default_prompt_that_is_empty_is_an_input_type(home: Settings, tmp_path: Path) -> None:
    """A request that names none, and one that names it, have no prompt."""
    built(empty_default_prompt, home, tmp_path / "m")
    facts = spec.load(version_folder(home.repository / "m"))
    assert [facts.prompt(None), facts.prompt("passage"), facts.prompt("query")] == [
        "", "", "query: ",
    ]  # fmt: skip


def test_a_text_without_tokens_fails_alone(home: Settings, tmp_path: Path) -> None:
    """A model whose tokenizer adds none: the empty text is named, the others are embedded."""
    built(gpt2, home, tmp_path / "m")
    ensemble = configs.read(home.repository, "m")
    facts = spec.load(ensemble.folder)
    tokenizer = text.load(ensemble.steps["m-tokenizer"], facts)
    assert [row.ids for row in tokenizer.encode([""], [None])] == [[]]
    session, _ = open_session(ensemble.steps["m-onnx"] / "model.onnx")
    from halimede_engine.engine import text_rows

    scheduler = Scheduler(session.run_together, session.plan, 1, make_rows=text_rows(tokenizer))
    engine = SharedEngine(scheduler, facts)
    embedded = engine.embed_now(["a text"], None)
    assert embedded is not None
    with pytest.raises(InvalidText, match="text 0 has no token for this model"):
        engine.embed_now([""], None)
    engine.close()


@pytest.mark.parametrize("steps", [False, True], ids=["one process", "steps"])
def test_triton_truncates_on_the_left_and_refuses_a_text_without_tokens(
    steps: bool, home: Settings, tmp_path: Path
) -> None:
    """In both forms of an ensemble: the end of a long text counts, also of one far beyond the limit;
    and the empty text of a call is named, while calls beside it are answered.
    """
    folder = left_truncation(tmp_path / "left")
    build(build_request(str(folder), "left", precisions=("fp32",)), home)
    build(build_request(str(gpt2(tmp_path / "sgpt")), "sgpt", precisions=("fp32",)), home)
    texts = [corpus.SENTENCES[0], " ".join(corpus.SENTENCES[:40]), " ".join(corpus.SENTENCES * 30)]
    expected = describe.load(folder, ModelOptions("left")).encode(texts, show_progress_bar=False)
    options, run = free_options(models=("left", "sgpt"), steps=steps), tmp_path / "run"
    run.mkdir()
    with wheel.serve(home.repository, home.python_backend, run, options):
        address = f"127.0.0.1:{options.grpc_port}"
        with Embedder(address, "left") as embedder:
            assert vectors.cosine(embedder.embed(texts).vectors, expected).min() >= 0.99999
        with Embedder(address, "sgpt") as embedder:
            with pytest.raises(InvalidText, match="text 1 has no token for this model"):
                embedder.embed(["a text", "", "another"])
            assert len(embedder.embed(["a text", "another"]).vectors) == 2


def test_the_memory_of_a_build_is_that_of_what_is_loaded(tmp_path: Path) -> None:
    """Not of every checkpoint in the folder: old formats, and other folders, are not loaded."""
    folder = small_models.like_minilm(tmp_path / "m")
    needed = describe.needed_bytes(folder)
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original" / "consolidated.safetensors")
    assert describe.needed_bytes(folder) == needed
    with pytest.raises(BuildError, match="of memory"):
        describe.check_memory(folder, "m", 1000)
