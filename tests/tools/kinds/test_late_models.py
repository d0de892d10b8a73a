"""Late-interaction models, built and served by a real Triton, against the definition of ColBERT and
PyLate on the same weights.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import forms
import numpy as np
import pytest
import small_models
import torch
from conftest import free_options, version_folder
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from tritonclient import grpc as triton_grpc

from halimede import Reranker
from halimede_engine import session
from halimede_engine.engine import SharedEngine, text_rows
from halimede_engine.scheduler import Scheduler
from halimede_ops import maxsim, spec, text, vectors
from halimede_ops.errors import InvalidModel, UntrustedCode
from halimede_repository import configs
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TEXTS = corpus.check_texts()[:32] + corpus.check_texts()[32:600:8][:68]
"""100 mixed texts: all odd ones, short and long ones."""
IN_STEPS = ("colbert", "attending", "modern-pylate", "without-expansion")
SCORED = ("colbert-maxsim", "modern-pylate-maxsim")


class Settled(NamedTuple):
    """What a folder says of its texts, as this test reads it."""

    query_tokens: int
    document_tokens: int
    markers: tuple[str, str]
    """Of queries and of documents."""
    expands: bool
    attends: bool
    skipped: set[int]
    replaced: int
    """Id of padding in a query's own text, -1 for none."""
    prompts: Mapping[str, str]


class Reference:
    """The vectors of a folder's texts by transformers' own model, one text at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        self.settled = self._pylate(folder) if (folder / "modules.json").exists() else None
        self.settled = self.settled or self._colbert(folder)
        dense = sorted(folder.glob("*_Dense/model.safetensors"))
        self.layers = [load_file(path) for path in dense or [folder / "model.safetensors"]]

    def _colbert(self, folder: Path) -> Settled:
        found = json.loads((folder / "artifact.metadata").read_text())
        ids = self.tokenizer(list(string.punctuation), add_special_tokens=False)["input_ids"]
        skipped = {row[0] for row in ids} if found["mask_punctuation"] else set()
        return Settled(
            found["query_maxlen"],
            found["doc_maxlen"],
            (found["query_token_id"], found["doc_token_id"]),
            expands=True,
            attends=found["attend_to_mask_tokens"],
            skipped=skipped | {self.tokenizer.pad_token_id},
            replaced=self.tokenizer.pad_token_id,
            prompts={},
        )

    def _pylate(self, folder: Path) -> Settled:
        found = json.loads((folder / "config_sentence_transformers.json").read_text())
        return Settled(
            found["query_length"],
            found["document_length"],
            (found["query_prefix"], found["document_prefix"]),
            expands=found["do_query_expansion"],
            attends=found["attend_to_expansion_tokens"],
            skipped=set(self.tokenizer.convert_tokens_to_ids(found["skiplist_words"])),
            replaced=-1,
            prompts=found["prompts"],
        )

    @functools.cache  # noqa: B019
    def __call__(self, given: str, *, is_query: bool) -> np.ndarray:
        """The vectors of a text, `[vectors, dims]`."""
        settled = self.settled
        limit = settled.query_tokens if is_query else settled.document_tokens
        marker = self.tokenizer.convert_tokens_to_ids(settled.markers[0 if is_query else 1])
        prompt = settled.prompts.get("query" if is_query else "document", "")
        ids = self.tokenizer(prompt + given, truncation=True, max_length=limit - 1)["input_ids"]
        ids = [ids[0], marker, *ids[1:]]
        own = len(ids)
        if is_query and settled.expands:
            mask_id = self.tokenizer.mask_token_id
            ids = [mask_id if token == settled.replaced else token for token in ids]
            ids += [mask_id] * (limit - own)
        attention = [1] * (len(ids) if settled.attends else own)
        attention += [0] * (len(ids) - len(attention))
        with torch.no_grad():
            hidden = self.model(
                input_ids=torch.tensor([ids]), attention_mask=torch.tensor([attention])
            ).last_hidden_state[0]
            for layer in self.layers:
                projected = hidden @ layer["linear.weight"].T
                if "residual.weight" in layer:
                    projected = projected + hidden @ layer["residual.weight"].T
                hidden = projected
            found = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        kept = [is_query or token not in settled.skipped for token in ids]
        return found[kept]

    def tokens(self, given: str, *, is_query: bool) -> int:
        """Tokens of the whole text, with its marker."""
        prompt = self.settled.prompts.get("query" if is_query else "document", "")
        return len(self.tokenizer(prompt + given, verbose=False)["input_ids"]) + 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("late")
    return Settings(home=folder / "home", repository=folder / "repository")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: form.make(parent / name) for name, form in forms.LATE.items()}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {name: Reference(folder) for name, folder in folders.items()}


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
    client.cache_clear()


@pytest.fixture(scope="module")
def served_in_steps(
    served: str, home: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of one Triton that serves forms as an ensemble's steps."""
    options = free_options(models=IN_STEPS + SCORED, steps=True)
    run = tmp_path_factory.mktemp("steps")
    with wheel.serve(home.repository, home.python_backend, run, options):
        yield f"127.0.0.1:{options.grpc_port}"
    client.cache_clear()


@functools.cache
def client(address: str) -> triton_grpc.InferenceServerClient:
    """One connection for all requests to a server."""
    return triton_grpc.InferenceServerClient(address)


def ask(address: str, name: str, **inputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The outputs of one request, by plain tritonclient."""
    tensors = []
    for key, values in inputs.items():
        tensors.append(triton_grpc.InferInput(key, [len(values), 1], "BYTES"))
        tensors[-1].set_data_from_numpy(np.array([[v.encode()] for v in values], np.object_))
    result = client(address).infer(name, tensors)
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def assert_alike(given: np.ndarray, expected: list[np.ndarray]) -> None:
    """As many vectors, each of cosine ≥ 0.99999, and zeros behind them."""
    matrices = maxsim.without_padding(given)
    assert [len(matrix) for matrix in matrices] == [len(matrix) for matrix in expected]
    ours, theirs = np.concatenate(matrices), np.concatenate(expected)
    assert vectors.cosine(ours, theirs).min() >= 0.99999
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() <= 1e-5


@pytest.mark.parametrize("server", ["served", "served_in_steps"])
@pytest.mark.parametrize("name", forms.LATE)
def test_vectors_are_those_of_the_definition(
    name: str, server: str, references: dict[str, Reference], request: pytest.FixtureRequest
) -> None:
    """100 mixed texts as queries and as documents, in one request of both and alone; TOKENS counts
    the whole text with its marker.
    """
    if server == "served_in_steps" and name not in IN_STEPS:
        pytest.skip("served in one process alone")
    address, reference = request.getfixturevalue(server), references[name]
    queries = [reference(text, is_query=True) for text in TEXTS]
    documents = [reference(text, is_query=False) for text in TEXTS]
    order = np.random.default_rng(5).permutation(200)
    for rows in (order[:100], order[100:]):
        answer = ask(
            address,
            name,
            TEXT=[(TEXTS * 2)[row] for row in rows],
            INPUT_TYPE=["query" if row < 100 else "document" for row in rows],
        )
        assert_alike(answer["MULTI_VECTORS"], [(queries + documents)[row] for row in rows])
        assert answer["TOKENS"][:, 0].tolist() == [
            reference.tokens((TEXTS * 2)[row], is_query=row < 100) for row in rows
        ]
    for row, given in enumerate(TEXTS):
        assert_alike(ask(address, name, TEXT=[given])["MULTI_VECTORS"], documents[row : row + 1])
        alone = ask(address, name, TEXT=[given], INPUT_TYPE=["query"])["MULTI_VECTORS"]
        assert_alike(alone, queries[row : row + 1])


def test_in_process_the_engine_gives_the_same(
    served: str, home: Settings, references: dict[str, Reference]
) -> None:
    """Queries and documents share their runs; both are in `Embeddings.heads`."""
    folder = home.repository / "colbert"
    facts = spec.load(version_folder(folder))
    tokenizer = text.load(version_folder(home.repository / "colbert-tokenizer"), facts)
    opened, _ = session.open_session(
        version_folder(home.repository / "colbert-onnx") / session.FILE_NAME,
        max_tokens=facts.max_tokens,
    )
    engine = SharedEngine(
        Scheduler(opened.run_outputs, opened.plan, 1, make_rows=text_rows(tokenizer)), facts
    )
    types = ["query", None, "document"] * 10
    prompted = tokenizer.prompted(TEXTS[:30], types)
    answers: Queue[Any] = Queue()
    engine.submit(prompted, None, answers.put)
    found = answers.get(timeout=60)
    expected = [
        references["colbert"](given, is_query=kind == "query")
        for given, kind in zip(TEXTS[:30], types, strict=True)
    ]
    assert_alike(found.heads["MULTI_VECTORS"], expected)
    engine.close()


def test_facts_are_in_the_config_and_the_spec(served: str, home: Settings) -> None:
    """A client reads the kind, the width, both token limits and the outputs there."""
    facts = spec.load(version_folder(home.repository / "modern-pylate"))
    assert (facts.kind, facts.dims, facts.max_tokens) == ("late_interaction", 32, 300)
    assert facts.late is not None
    assert (facts.late.query_tokens, facts.late.document_tokens) == (48, 300)
    assert spec.ModelSpec(**vars(facts)) == facts
    config = (home.repository / "modern-pylate" / "config.pbtxt").read_text()
    assert 'string_value: "late_interaction"' in config
    assert '"MULTI_VECTORS"' in config
    assert '"EMBEDDING"' not in config


def test_lower_precisions_are_held_to_cosines_and_ranks(
    folders: dict[str, Path], home: Settings
) -> None:
    """The record has both; INT8 of queries that nothing attends to fully, too."""
    request = build_request(
        str(folders["colbert"]), "ranks", precisions=("fp16", "int8"), accepted=("fp16", "int8")
    )
    build(request, home)
    for precision, tau in (("fp16", 0.98), ("int8", 0.9)):
        folder = version_folder(home.repository / f"ranks-{precision}")
        record = json.loads((folder / "quality.json").read_text())
        assert record["mean_cosine"] >= 0.995
        assert record["kendall_tau"] >= tau
        assert record["ndcg_10"] >= 0.94
        assert record["invariance"] >= 0.9999


SETTINGS = {
    "artifact.metadata": {
        "query_maxlen": 30,
        "doc_maxlen": 100,
        "query_token_id": "[unused1]",
        "mask_punctuation": False,
        "attend_to_mask_tokens": True,
    },
    "config_sentence_transformers.json": {
        "query_length": 30,
        "document_length": 100,
        "document_prefix": "[Q] ",
        "skiplist_words": ["!"],
        "attend_to_expansion_tokens": True,
        "do_query_expansion": False,
        "prompts": {"query": "find: "},
    },
}


@pytest.mark.parametrize(
    ("form", "file", "key"),
    [
        ("colbert" if file == "artifact.metadata" else "pylate", file, key)
        for file, fields in SETTINGS.items()
        for key in fields
    ],
)
def test_the_space_covers_each_setting(
    form: str, file: str, key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Markers, lengths, skipped words and expansion change vectors."""
    from halimede_tools.build import describe

    options = describe.ModelOptions("m")
    folder = tmp_path / "m"
    forms.LATE[form].make(folder)
    before = describe.describe(describe.load(folder, options), folder, options).space
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | {key: SETTINGS[file][key]}))
    after = describe.describe(describe.load(folder, options), folder, options).space
    assert before != after


def test_max_tokens_is_the_limit_of_documents(folders: dict[str, Path]) -> None:
    """It may exceed the length that the folder names, up to the model's positions."""
    from halimede_tools.build import describe

    options = describe.ModelOptions("m", max_tokens=400)
    model = describe.load(folders["colbert"], options)
    facts = describe.describe(model, folders["colbert"], options)
    assert facts.late is not None
    assert (facts.max_tokens, facts.late.document_tokens, facts.late.query_tokens) == (400, 400, 32)
    with pytest.raises(InvalidModel, match="takes 1 to 512 tokens"):
        describe.load(folders["colbert"], options._replace(max_tokens=600))


def damaged(folder: Path, what: str) -> Path:
    """A checkpoint, or a folder of PyLate, with one fault."""
    if what in ("no linear", "dim"):
        small_models.like_colbert(folder)
        if what == "dim":
            small_models._set(folder / "artifact.metadata", dim=96)
            return folder
        small_models.bert(folder)
        small_models._set(folder / "config.json", architectures=["HF_ColBERT"])
        return folder
    small_models.like_pylate(folder)
    if what == "marker":
        small_models._set(folder / "config_sentence_transformers.json", query_prefix="[X] ")
    if what == "activation":
        small_models._set(folder / "1_Dense" / "config.json", activation_function="theirs.Own")
    if what == "no dense":
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps(modules[:1]))
    if what == "code":
        small_models._set(folder / "config.json", auto_map={"AutoModel": "theirs--code.Model"})
    return folder


FAULTS: dict[str, tuple[Any, str]] = {
    "no linear": (InvalidModel, "no tensor linear.weight.*--kind dense"),
    "dim": (InvalidModel, "vectors of 96 dimensions; linear.weight gives 32"),
    "marker": (InvalidModel, r"'\[X\] ', which is no token of its tokenizer"),
    "activation": (UntrustedCode, "activation that is not of torch"),
    "no dense": (InvalidModel, "no Dense module"),
    "code": (UntrustedCode, "Python code of its own"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_not_supported_is_refused_in_words(what: str, tmp_path: Path) -> None:
    """With what was found, before anything is exported."""
    from halimede_tools.build import describe

    folder, options = damaged(tmp_path / "m", what), describe.ModelOptions("m")
    error, words = FAULTS[what]
    with pytest.raises(error, match=words):
        describe.describe(describe.load(folder, options), folder, options)


PAIRS = [
    (query, document)
    for query in TEXTS[20:60:4]
    for document in [*TEXTS[:10], *TEXTS[40:80:4], TEXTS[31]]
]
"""210 pairs: odd, short and long documents of ten queries."""


@pytest.mark.parametrize("name", ["colbert", "modern-pylate"])
@pytest.mark.parametrize("server", ["served", "served_in_steps"])
def test_maxsim_on_the_server_gives_scores_as_a_reranker(
    name: str, server: str, references: dict[str, Reference], request: pytest.FixtureRequest
) -> None:
    """QUERY and TEXT to SCORE, within 1e-4 of MaxSim of the definition's vectors, in requests of
    one pair and of 105; TOKENS is that of the text.
    """
    address, reference = request.getfixturevalue(server), references[name]
    expected = [
        maxsim.score(reference(query, is_query=True), [reference(document, is_query=False)])[0]
        for query, document in PAIRS
    ]
    for start, stop in ((0, 105), (105, 210), (7, 8)):
        pairs = PAIRS[start:stop]
        queries, documents = map(list, zip(*pairs, strict=True))
        answer = ask(address, f"{name}-maxsim", QUERY=queries, TEXT=documents)
        assert np.abs(answer["SCORE"][:, 0] - expected[start:stop]).max() <= 1e-4
        assert answer["TOKENS"][:, 0].tolist() == [
            reference.tokens(document, is_query=False) for document in documents
        ]


def test_in_process_maxsim_gives_the_scores_of_triton(
    served: str, home: Settings, references: dict[str, Reference]
) -> None:
    """The same reranker in both hosts, from the same folders."""
    provider = {"provider": "onnx", "model_id": "colbert-maxsim", "path": str(home.repository)}
    query, documents = "where is the harbour?", TEXTS[::5]
    with Reranker("local", config={"models": {"local": provider}}) as reranker:
        found = reranker.score([(query, document) for document in documents])
    with Reranker("colbert-maxsim", url=served, timeout_s=180) as reranker:
        on_triton = reranker.score([(query, document) for document in documents])
        ranking = reranker.rank(query, documents, top_k=3)
    expected = maxsim.score(
        references["colbert"](query, is_query=True),
        [references["colbert"](document, is_query=False) for document in documents],
    )
    assert np.abs(found.scores - expected).max() <= 1e-4
    assert np.abs(on_triton.scores - expected).max() <= 1e-4
    assert found.tokens.tolist() == on_triton.tokens.tolist()
    np.testing.assert_allclose(ranking.scores, np.sort(expected)[:-4:-1], atol=1e-4)


def test_maxsim_is_switched_with_its_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """A rebuild with another limit serves the new version of both, and keeps the one before."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    for max_tokens in (100, 140):
        request = build_request(
            str(folders["without-expansion"]), "m", precisions=("fp32",), max_tokens=max_tokens
        )
        build(request, home)
    model, scoring = (home.repository / name for name in ("m", "m-maxsim"))
    assert configs.stored_versions(model) == configs.stored_versions(scoring)
    assert len(configs.stored_versions(scoring)) == 2
    written = (scoring / "config.pbtxt").read_text()
    assert configs.versions(written) == configs.versions((model / "config.pbtxt").read_text())
    assert configs.parameter(written, "model_version") == str(configs.versions(written)[0])
    assert configs.parameter(written, "max_tokens") == "140"
