"""Rerankers that are decoders, built and served by a real Triton, against CrossEncoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import forms
import numpy as np
import pytest
import small_models
from conftest import free_options, version_folder
from sentence_transformers import CrossEncoder
from tritonclient import grpc as triton_grpc

from halimede_ops import spec, text
from halimede_ops.errors import InvalidModel
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {name: form.make for name, form in forms.DECODERS.items()}
PAIRS = [pair for pair in corpus.check_pairs() if any(pair)][::4][:100]
"""100 mixed pairs: odd texts as query and as document, short ones, and long ones that are cut."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Settings:
    folder = tmp_path_factory.mktemp("decoders")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, source in folders.items():
        kind = None if name == "saved" else "reranker"
        build(build_request(str(source), name, precisions=("fp32",), kind=kind), home)
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


def ask(served: str, name: str, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """SCORE and TOKENS of one request."""
    with triton_grpc.InferenceServerClient(served) as client:
        tensors = []
        for place, tensor in enumerate(("QUERY", "TEXT")):
            values = np.array([[pair[place].encode()] for pair in pairs], np.object_)
            tensors.append(triton_grpc.InferInput(tensor, [len(pairs), 1], "BYTES"))
            tensors[-1].set_data_from_numpy(values)
        answer = client.infer(name, tensors)
        return {output: answer.as_numpy(output)[:, 0] for output in ("SCORE", "TOKENS")}


@pytest.mark.parametrize("name", FORMS)
def test_served_scores_are_those_of_a_cross_encoder(
    name: str, served: str, folders: dict[str, Path]
) -> None:
    """Within 1e-4 for 100 mixed pairs, in one request and alone; some of them are cut."""
    model = CrossEncoder(str(folders[name]), device="cpu")
    expected = model.predict([list(pair) for pair in PAIRS], show_progress_bar=False)
    together = ask(served, name, PAIRS)
    assert np.abs(together["SCORE"] - expected).max() <= 1e-4
    alone = [ask(served, name, [pair])["SCORE"][0] for pair in PAIRS]
    assert np.abs(np.array(alone) - expected).max() <= 1e-4
    assert together["TOKENS"].max() > model.max_seq_length
    assert np.ptp(expected) > 0.01


def test_the_end_of_a_chat_is_kept_where_its_document_is_cut(
    home: Settings, folders: dict[str, Path]
) -> None:
    """The ids are those of sentence-transformers; TOKENS counts the whole chat."""
    folder = version_folder(home.repository / "qwen3-tokenizer")
    facts = spec.load(folder)
    assert "assistant" in facts.template[2]
    long = "words of a document " * 200
    [tokens] = text.load(folder, facts).encode(["a query"], [None], [long])
    model = CrossEncoder(str(folders["qwen3"]), device="cpu")
    assert tokens.ids == model.preprocess([("a query", long)])["input_ids"][0].tolist()
    assert tuple(tokens.ids[-len(facts.last_ids) :]) == facts.last_ids
    assert len(tokens.ids) == facts.max_tokens < tokens.total


def test_a_prompt_is_part_of_the_chat(home: Settings) -> None:
    """A CrossEncoder's prompt is the system message, not text in front of the query."""
    facts = spec.load(version_folder(home.repository / "saved"))
    assert "<Instruct>: Find what answers\n" in facts.template[0]
    assert facts.default_input_type is None


QUERY = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
DOCUMENT = (
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (f"{QUERY} and no more", "without the query or the document"),
        (f"{DOCUMENT} before {QUERY}", "without the query or the document"),
        ("{{ raise_exception('roles must be user') }}", "cannot be rendered"),
        (f"{QUERY[:-3]} | trim }}}} is asked of {DOCUMENT}.", "changes a text"),
    ],
)
def test_chat_templates_that_are_not_supported_are_named(
    template: str, message: str, tmp_path: Path, home: Settings
) -> None:
    """The error says what was found, and what template would work."""
    folder = small_models.qwen3_reranker(tmp_path / "m", template)
    with pytest.raises(InvalidModel, match=message) as refused:
        build(build_request(str(folder), "m", precisions=("fp32",), kind="reranker"), home)
    assert "chat_template.jinja that puts the content" in str(refused.value)
