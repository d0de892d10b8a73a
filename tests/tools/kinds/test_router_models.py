"""Models with a Router, built and served by a real Triton, against sentence-transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forms
import numpy as np
import pytest
from conftest import free_options, version_folder
from sentence_transformers import SentenceTransformer
from tritonclient import grpc as triton_grpc

from halimede import Embedder
from halimede_ops import spec
from halimede_ops.errors import DeployError, InvalidInput, InvalidModel, UnknownInputType
from halimede_repository import configs
from halimede_tools.build.check import cosines_to
from halimede_tools.build.kinds import routes
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

FORMS = {name: form.make for name, form in forms.ROUTERS.items()}
TEXTS = [text for text in corpus.check_texts()[:140] if text.strip()][:100]
"""100 mixed texts: odd, short and long ones."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Settings:
    folder = tmp_path_factory.mktemp("routers")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, source in folders.items():
        precisions = ("fp32", "int8") if name == "mapped" else ("fp32",)
        assert build(build_request(str(source), name, precisions=precisions), home)[0] == name
    return home


@pytest.fixture(scope="module", params=["one process", "steps", "in process"])
def served(
    request: pytest.FixtureRequest, home: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Embedder]]:
    """What opens a model: a Triton that serves only the routers by name, or this process."""
    if request.param == "in process":
        path = str(home.repository)
        yield lambda name: Embedder(
            config={"models": {name: {"provider": "onnx", "model_id": name, "path": path}}}
        )
        return
    options = free_options(models=tuple(FORMS), steps=request.param == "steps")
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, options):
        address = f"127.0.0.1:{options.grpc_port}"
        yield lambda name: Embedder(address, name, timeout_s=60)


def expected(name: str, folder: Path) -> dict[str | None, np.ndarray]:
    """Input type → sentence-transformers' vectors of TEXTS."""
    model: Any = SentenceTransformer(str(folder), device="cpu")
    documents = model.encode if name == "asym" else model.encode_document
    given = {"query": model.encode_query(TEXTS)}
    given["document"] = documents(TEXTS, task="doc") if name == "asym" else documents(TEXTS)
    return given if name == "mapped" else {None: model.encode(TEXTS), **given}


@pytest.mark.parametrize("name", FORMS)
def test_vectors_are_those_of_the_route(
    name: str, served: Callable[[str], Embedder], folders: dict[str, Path]
) -> None:
    """Cosine ≥ 0.99999 of queries, documents, and texts without a type, together and alone."""
    with served(name) as embedder:
        for input_type, vectors in expected(name, folders[name]).items():
            together = embedder.embed(TEXTS, input_type=input_type).vectors
            assert cosines_to(together, vectors).min() >= 0.99999
            assert np.allclose(
                np.linalg.norm(together, axis=1), np.linalg.norm(vectors, axis=1), rtol=1e-3
            )
            alone = [embedder.embed([text], input_type=input_type).vectors for text in TEXTS[::4]]
            assert cosines_to(np.concatenate(alone), vectors[::4]).min() >= 0.99999
        if name == "mapped":
            with pytest.raises(UnknownInputType, match="give one of document, query"):
                embedder.embed(TEXTS[:2])


def test_rows_of_one_request_may_differ_in_route(
    home: Settings, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Vectors and tokens come in the order of the rows, cut to DIMENSIONS."""
    model: Any = SentenceTransformer(str(folders["router"]), device="cpu")
    types = ["query", "document", "", "passage", "query"] * 20
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    plain, passages = model.encode(TEXTS), model.encode(TEXTS, prompt_name="passage")
    by_type = {"query": queries, "document": documents, "": plain, "passage": passages}
    wanted = np.stack([by_type[given][row] for row, given in enumerate(types)])[:, :32]
    options = free_options(models=("router",))
    with (
        wheel.serve(home.repository, home.python_backend, tmp_path, options),
        triton_grpc.InferenceServerClient(f"127.0.0.1:{options.grpc_port}") as client,
    ):
        tensors = []
        for tensor, values in (("TEXT", TEXTS), ("INPUT_TYPE", types)):
            given = np.array([[value.encode()] for value in values], np.object_)
            tensors.append(triton_grpc.InferInput(tensor, [100, 1], "BYTES"))
            tensors[-1].set_data_from_numpy(given)
        tensors.append(triton_grpc.InferInput("DIMENSIONS", [100, 1], "INT32"))
        tensors[-1].set_data_from_numpy(np.full((100, 1), 32, np.int32))
        answer = client.infer("router", tensors)
    assert cosines_to(answer.as_numpy("EMBEDDING"), wanted).min() >= 0.99999
    assert answer.as_numpy("TOKENS").shape == (100, 1)


def test_towers_are_models_of_one_space(home: Settings) -> None:
    """A Router with one route for all texts is one model; a precision is that of both towers."""
    for name in ("router", "router-query", "router-document"):
        facts = spec.load(version_folder(home.repository / name))
        assert facts.space == spec.load(version_folder(home.repository / "router")).space
    assert not (home.repository / "single-query").exists()
    config = (home.repository / "mapped-int8" / configs.CONFIG).read_text()
    assert configs.parameter(config, "query_model") == "mapped-query-int8"
    assert configs.models_to_load(home.repository, ("router",)) == (
        "router", "router-document", "router-query",
    )  # fmt: skip


def test_a_router_is_built_again_under_its_name_and_no_other_takes_it(
    home: Settings, folders: dict[str, Path]
) -> None:
    """Its towers' names are its own; a candidate of it is refused."""
    before = configs.read(home.repository, "router").folder
    build(build_request(str(folders["router"]), "router", precisions=("fp32",)), home)
    assert configs.read(home.repository, "router").folder == before
    with pytest.raises(InvalidInput, match="is the name of a folder of router"):
        build(build_request(str(folders["single"]), "router-query", precisions=("fp32",)), home)
    with pytest.raises(DeployError, match="has a Router"):
        build(build_request(str(folders["router"]), "router"), home, candidate=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": {"title": [], "body": []}}, "the routes title, body; supported is one"),
        ({"types": {}}, "the config of its Router is missing or damaged"),
    ],
)
def test_routes_that_are_not_supported_are_named(
    change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path, home: Settings
) -> None:
    """What was found, and what would work."""
    folder = Path(shutil.copytree(folders["router"], tmp_path / "m"))
    path = folder / "router_config.json"
    written = json.loads(path.read_text()) | change
    written["parameters"]["default_route"] = None
    path.write_text(json.dumps(written))
    with pytest.raises(InvalidModel, match=message):
        build(build_request(str(folder), "m"), home)


def test_the_route_of_a_task_is_that_of_router(folders: dict[str, Path]) -> None:
    """For every task, with and without mappings."""
    for name, folder in folders.items():
        model: Any = SentenceTransformer(str(folder), device="cpu")
        [router] = [m for m in model.modules() if type(m).__name__ == "Router"]
        found = routes.read(folder, name)
        for task in (None, "query", "document", "doc", "other"):
            try:
                wanted = router._resolve_route(task=task, modality="text")
            except ValueError:
                wanted = None
            assert found.of(task) == wanted
