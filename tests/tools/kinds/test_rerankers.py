"""Rerankers and classifiers, built and served by a real Triton, against CrossEncoder on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import forms
import numpy as np
import pytest
import small_models
from conftest import free_options, version_folder
from sentence_transformers import CrossEncoder
from tritonclient import grpc as triton_grpc

from halimede_ops import spec
from halimede_ops.errors import InvalidInput, InvalidModel, UntrustedCode
from halimede_tools.build.kinds import scores
from halimede_tools.build.kinds.recognise import recognise
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

RERANKERS = {name: form.make for name, form in forms.RERANKERS.items()}
CLASSIFIERS = {name: form.make for name, form in forms.CLASSIFIERS.items()}
LABELS = ["arts", "sports", "science", 'the "rest"']
PAIRS = corpus.check_pairs()[::4][:100]
"""100 mixed pairs: odd texts as query and as document, short and long ones."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("scores")
    return Settings(home=folder / "home", repository=folder / "repository")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in (RERANKERS | CLASSIFIERS).items()}


@pytest.fixture(scope="module")
def built(home: Settings, folders: dict[str, Path]) -> Settings:
    for name, folder in folders.items():
        build(build_request(str(folder), name, precisions=("fp32",)), home)
    return home


@pytest.fixture(scope="module", params=[False, True], ids=["one process", "steps"])
def served(
    request: pytest.FixtureRequest, built: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a Triton that serves all of them, in one process or in steps."""
    options = free_options(steps=request.param)
    with wheel.serve(
        built.repository, built.python_backend, tmp_path_factory.mktemp("run"), options
    ):
        yield f"127.0.0.1:{options.grpc_port}"


def ask(served: str, name: str, **texts: list[str]) -> dict[str, np.ndarray]:
    """The outputs of one request, by plain tritonclient."""
    with triton_grpc.InferenceServerClient(served) as client:
        tensors = []
        for tensor_name, values in texts.items():
            tensor = triton_grpc.InferInput(tensor_name, [len(values), 1], "BYTES")
            encoded = np.array([[value.encode()] for value in values], np.object_)
            tensors.append(tensor.set_data_from_numpy(encoded))
        result = client.infer(name, tensors)
        return {
            output.name: result.as_numpy(output.name) for output in result.get_response().outputs
        }


@pytest.mark.parametrize("name", RERANKERS)
def test_served_scores_are_those_of_a_cross_encoder(
    name: str, served: str, folders: dict[str, Path]
) -> None:
    """Within 1e-4 for 100 mixed pairs, in one request and alone; TOKENS tells what was cut."""
    model = CrossEncoder(str(folders[name]), device="cpu")
    expected = model.predict([list(pair) for pair in PAIRS], show_progress_bar=False)
    queries, documents = map(list, zip(*PAIRS, strict=True))
    answer = ask(served, name, QUERY=queries, TEXT=documents)
    assert np.abs(answer["SCORE"][:, 0] - expected).max() <= 1e-4
    alone = [ask(served, name, QUERY=[query], TEXT=[text])["SCORE"][0, 0] for query, text in PAIRS]
    assert np.abs(np.array(alone) - expected).max() <= 1e-4
    whole = model.tokenizer(queries, documents, truncation=False)["input_ids"]
    assert answer["TOKENS"][:, 0].tolist() == [len(ids) for ids in whole]


def test_a_classifier_of_pairs_gives_the_scores_of_its_activation(
    served: str, folders: dict[str, Path]
) -> None:
    """An NLI model that CrossEncoder saved: the logits, as `predict` gives them."""
    model = CrossEncoder(str(folders["nli"]), device="cpu")
    expected = model.predict([list(pair) for pair in PAIRS], show_progress_bar=False)
    texts, seconds = map(list, zip(*PAIRS, strict=True))
    assert np.abs(ask(served, "nli", TEXT=texts, TEXT_PAIR=seconds)["SCORES"] - expected).max() <= (
        1e-4
    )


def test_a_plain_classifier_gives_the_probabilities_of_transformers_pipeline(
    served: str, folders: dict[str, Path]
) -> None:
    """One probability for each label, in the config's order."""
    from transformers import pipeline

    texts = [text for _, text in PAIRS]
    classify = pipeline(
        "text-classification", model=str(folders["topics"]), top_k=None, device="cpu"
    )
    answers = [
        {entry["label"]: entry["score"] for entry in answer}
        for answer in classify(texts, truncation=True)
    ]
    expected = np.array([[answer[label] for label in LABELS] for answer in answers])
    assert np.abs(ask(served, "topics", TEXT=texts)["SCORES"] - expected).max() <= 1e-4


def test_kind_and_labels_are_in_the_config_and_the_spec(built: Settings) -> None:
    """A client reads there what the model is."""
    facts = spec.load(version_folder(built.repository / "topics"))
    assert (facts.kind, list(facts.labels), facts.dims) == ("classifier", LABELS, 4)
    text = (built.repository / "topics" / "config.pbtxt").read_text()
    assert 'string_value: "classifier"' in text
    assert json.dumps(json.dumps(LABELS)) in text
    assert spec.load(version_folder(built.repository / "bert")).kind == "reranker"


def test_int8_is_held_to_the_order_of_the_scores(folders: dict[str, Path], home: Settings) -> None:
    """The record has the rank agreement that was measured, not a cosine."""
    request = build_request(
        str(folders["bert"]), "ranks", precisions=("fp32", "int8"), accepted=("int8",)
    )
    build(request, home)
    record = json.loads(
        (version_folder(home.repository / "ranks-int8") / "quality.json").read_text()
    )
    assert record["kendall_tau"] >= 0.85
    assert record["ndcg_10"] >= 0.95
    assert record["invariance"] <= 2e-3
    assert "mean_cosine" not in record


def test_rank_agreement_is_that_of_the_definition() -> None:
    """Equal orders give 1; the reverse order gives tau -1; NDCG counts the first ten."""
    expected = np.arange(20.0)
    assert scores.kendall_tau(3 * expected + 1, expected) == 1
    assert scores.kendall_tau(-expected, expected) == pytest.approx(-1)
    assert scores.ndcg(expected, expected) == 1
    gains, discounts = np.arange(10, 0, -1), 1 / np.log2(np.arange(2, 12))
    swapped = expected.copy()
    swapped[[19, 18]] = swapped[[18, 19]]
    wrong = gains.copy()
    wrong[[0, 1]] = wrong[[1, 0]]
    assert scores.ndcg(swapped, expected) == pytest.approx(wrong @ discounts / (gains @ discounts))
    # Which of two equal documents is first is decided by rounding.
    equal = np.array([3, 2, 2 + 1e-6, 1, 0], np.float32)
    assert scores.ndcg(np.array([3, 2 + 1e-6, 2, 1, 0], np.float32), equal) == pytest.approx(1)
    assert scores.ndcg(np.array([3, 1, 2, 2, 0], np.float32), equal) < 0.999


FORMS = {
    "plain encoder": ({"architectures": ["BertModel"]}, {}, (), "dense"),
    "masked language model": ({"architectures": ["BertForMaskedLM"]}, {}, (), "dense"),
    "reranker": (
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        {},
        (),
        "reranker",
    ),
    "classifier": (
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
        {},
        (),
        "classifier",
    ),
    "labels by default": (
        {"architectures": ["BertForSequenceClassification"]},
        {},
        (),
        "classifier",
    ),
    "saved cross-encoder": (
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        {"model_type": "CrossEncoder"},
        ("Transformer",),
        "reranker",
    ),
    "decoder cross-encoder": (
        {"architectures": ["Qwen3ForCausalLM"]},
        {"model_type": "CrossEncoder"},
        ("Transformer", "LogitScore"),
        "reranker",
    ),
    "sentence-transformers": (
        {"architectures": ["BertModel"]},
        {"model_type": "SentenceTransformer"},
        ("Transformer", "Pooling"),
        "dense",
    ),
    "SPLADE": (
        {"architectures": ["BertForMaskedLM"]},
        {"model_type": "SparseEncoder"},
        ("Transformer", "SpladePooling"),
        "sparse",
    ),
    "SPLADE without a model type": (
        {"architectures": ["BertForMaskedLM"]},
        {},
        ("MLMTransformer", "SpladePooling"),
        "sparse",
    ),
    "ColBERT": ({"architectures": ["HF_ColBERT"]}, {}, (), "late_interaction"),
    "PyLate": (
        {"architectures": ["BertModel"]},
        {"skiplist_words": ["!"], "query_prefix": "[Q] "},
        ("Transformer", "pylate.models.Dense.Dense"),
        "late_interaction",
    ),
}
"""config.json, config_sentence_transformers.json, modules → the kind."""


@pytest.mark.parametrize("form", FORMS)
def test_the_kind_is_what_the_folder_says(form: str, tmp_path: Path) -> None:
    """sentence-transformers' own files first, then the class of a plain model; `kind` overrides."""
    config, saved, modules, kind = FORMS[form]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if saved:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(saved))
    if modules:
        types = [
            module if "." in module else f"sentence_transformers.models.{module}"
            for module in modules
        ]
        (tmp_path / "modules.json").write_text(json.dumps([{"type": name} for name in types]))
    assert recognise(tmp_path, "m") == kind
    assert recognise(tmp_path, "m", "dense") == "dense"


def test_a_head_of_another_task_is_refused(tmp_path: Path) -> None:
    """It would be dropped without a word; `--kind dense` drops it on purpose."""
    (tmp_path / "config.json").write_text('{"architectures": ["BertForTokenClassification"]}')
    with pytest.raises(InvalidModel, match=r"BertForTokenClassification.*--kind dense"):
        recognise(tmp_path, "m")
    with pytest.raises(InvalidInput, match="kind is 'splade'; use dense, reranker"):
        recognise(tmp_path, "m", "splade")


def test_an_activation_of_other_code_needs_trust(
    folders: dict[str, Path], home: Settings, tmp_path: Path
) -> None:
    """sentence-transformers would use another activation in its place, with a warning."""
    folder = small_models.bert_reranker(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "theirs.Activation"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UntrustedCode, match="activation that is not of torch"):
        build(build_request(str(folder), "m", precisions=("fp32",)), home)
