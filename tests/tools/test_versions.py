"""Versions numbered by content: what a number is made of, and models swapped while they serve."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from conftest import MODEL, PRECISIONS, free_options, version_folder, wait_until

from halimede import Embedder, Embeddings, ModelNotFound
from halimede_ops import vectors
from halimede_repository import configs
from halimede_tools.build import keys, model_config, repository
from halimede_tools.build.graph import rewrite
from halimede_tools.build.plan import build_request, make
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

SWAPS = 2
CALLERS = 8
"""Of each protocol, and of each client."""
OTHER = "f" * 16
TEXTS = [f"text number {index}, one of many" for index in range(40)]


@pytest.fixture(scope="module")
def built(settings: Settings) -> repository.Built:
    """The default model in FP32."""
    [made] = make(build_request(MODEL), settings.models / MODEL, settings)
    return dataclasses.replace(made, models={"fp32": made.models["fp32"]})


@pytest.fixture(scope="module")
def other(built: repository.Built, settings: Settings) -> repository.Built:
    """Another model of the same name: INT8 weights called FP32 give other vectors."""
    spec = dataclasses.replace(built.spec, space=OTHER)
    weights = settings.models / MODEL / "int8" / "model.onnx"
    quality = {"fp32": built.quality["fp32"] | {"space": OTHER}}
    return dataclasses.replace(built, spec=spec, models={"fp32": weights}, quality=quality)


def test_a_number_says_what_it_is_made_of(built: repository.Built) -> None:
    """Spec, precision and options each change the numbers of the steps that they decide, and an
    ensemble's number changes with any step's; where a file lies and what is in it do not.
    """

    def numbers(changed: repository.Built) -> list[int]:
        steps = changed.steps("fp32")
        return [*(pin.version for pin in steps.values()), changed.version("fp32")]

    now = numbers(built)
    spec = dataclasses.replace(built.spec, max_tokens=128)
    assert not set(numbers(dataclasses.replace(built, spec=spec))) & set(now)
    quantised = numbers(dataclasses.replace(built, options={"fp32": "other texts"}))
    assert [one == two for one, two in zip(now, quantised, strict=True)] == [
        True,
        False,
        True,
        False,
    ]
    assert numbers(dataclasses.replace(built, models={"fp32": Path("/elsewhere")})) == now
    assert all(len(str(one)) == 12 and one < 2**53 for one in now)
    assert built.version("fp32") != built.version("int8")


def structure(graph: onnx.GraphProto) -> list[object]:
    """What a graph computes: operators, attributes, how they are linked, types and shapes of
    constants and the values of int64 ones. Names and weights are left out: they differ between
    releases of PyTorch, and between CPUs.
    """
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    def value(attribute: onnx.AttributeProto) -> object:
        given = onnx.helper.get_attribute_value(attribute)
        if isinstance(given, onnx.GraphProto):
            return structure(given)
        return constant(given) if isinstance(given, onnx.TensorProto) else repr(given)

    inputs = [number(entry.name) for entry in graph.input]
    constants = {entry.name: constant(entry) for entry in graph.initializer}
    nodes = [
        [
            node.domain,
            node.op_type,
            [constants.get(name) or number(name) for name in node.input],
            [number(name) for name in node.output],
            [[entry.name, value(entry)] for entry in sorted(node.attribute, key=lambda a: a.name)],
        ]
        for node in graph.node
    ]
    return [inputs, nodes, [number(entry.name) for entry in graph.output]]


def constant(tensor: onnx.TensorProto) -> list[object]:
    whole = tensor.data_type == onnx.TensorProto.INT64
    values = onnx.numpy_helper.to_array(tensor).tolist() if whole else None
    return [tensor.data_type, list(tensor.dims), values]


def test_a_changed_graph_raises_the_recipe(settings: Settings) -> None:
    """Numbers know a graph by RECIPE alone: where the default model's graphs are others than those
    noted beside it, RECIPE is to be raised and the new ones are to be noted. Of INT8 the kinds of
    nodes count: how many there are depends on the activations, which differ between CPUs.
    """
    found = {}
    for precision in PRECISIONS:
        graph = rewrite.load(settings.models / MODEL / precision / "model.onnx").graph
        whole = structure(graph)
        if precision == "int8":
            whole = sorted({json.dumps([*node[:2], node[4]]) for node in whole[1]})
        found[precision] = keys.key_of(str(repository.RECIPE), json.dumps(whole))
    assert found == repository.RECIPE_GRAPHS


def test_every_config_names_its_version_and_every_step_is_pinned(settings: Settings) -> None:
    for path in settings.repository.glob(f"{MODEL}*/config.pbtxt"):
        [version] = model_config.read(path).version_policy.specific.versions
        assert (path.parent / str(version)).is_dir()
        for step in model_config.read(path).ensemble_scheduling.step:
            assert version_folder(settings.repository / step.model_name).name == str(
                step.model_version
            )


def test_configs_are_read_without_tritons_messages(tmp_path: Path) -> None:
    """Policy and pins are read however a config is laid out; without them the highest serves."""
    written = "version_policy: { specific { versions: [ 5,\n 12 ] } }\n"
    assert configs.versions(written) == [5, 12]
    assert configs.versions("version_policy { latest { num_versions: 2 } }") == []
    for step, version in (("m-tokenizer", 7), ("m-onnx", 9)):
        for number in (version, 3):
            (tmp_path / step / str(number)).mkdir(parents=True)
    (tmp_path / "m" / "4").mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text(
        'step {\n model_name: "m-tokenizer"\n model_version: 3\n}\n'
        'step {\n model_name: "m-onnx"\n model_version: -1\n}\n'
    )
    served = configs.read(tmp_path, "m")
    assert served.folder == tmp_path / "m" / "4"
    assert {name: folder.name for name, folder in served.steps.items()} == {
        "m-tokenizer": "3",
        "m-onnx": "9",
    }
    shutil.rmtree(tmp_path / "m-onnx")
    with pytest.raises(ModelNotFound, match="no built model 'm'"):
        configs.read(tmp_path, "m")
    assert configs.is_built(tmp_path / "m")
    assert not configs.is_built(tmp_path / "none")


def test_a_write_keeps_what_was_served_and_no_more(
    built: repository.Built, other: repository.Built, tmp_path: Path
) -> None:
    """A server may still run the version before: it stays on disk, served by no config; the one
    before that goes. Writing the same again removes nothing.
    """
    third = dataclasses.replace(built, spec=dataclasses.replace(built.spec, space="e" * 16))
    for one in (built, other, third, third):
        repository.write(one, tmp_path)
    for name in repository.family(built):
        assert len(configs.stored_versions(tmp_path / name)) == 2
    assert configs.stored_versions(tmp_path / MODEL) == sorted(
        [other.version("fp32"), third.version("fp32")]
    )
    for pin in third.steps("fp32").values():
        assert version_folder(tmp_path / pin.model).name == str(pin.version)
    assert version_folder(tmp_path / MODEL).name == str(third.version("fp32"))


def swap(built: repository.Built, folder: Path, control: grpcclient.InferenceServerClient) -> None:
    """Put a model under the name of one that is served, telling the server after each move."""
    repository.place(built, folder)
    for move in (repository.add, repository.switch, repository.release):
        move(built.versions, folder)
        control.load_model(MODEL)


@contextlib.contextmanager
def calling(count: int, call: Callable[[], None]) -> Iterator[None]:
    """`count` threads that call again and again; what one raises is raised."""
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            call()

    with ThreadPoolExecutor(count) as callers:
        running = [callers.submit(calls) for _ in range(count)]
        try:
            yield
        finally:
            stop.set()
        for one in running:
            one.result()


def bare_caller(
    api: Any, address: str, answers: list[tuple[str, np.ndarray]]
) -> Callable[[], None]:
    """Sends TEXTS[0] by plain tritonclient, one connection a thread; no error is caught."""
    mine = threading.local()

    def call() -> None:
        if not hasattr(mine, "client"):
            mine.client = api.InferenceServerClient(address)
        tensor = api.InferInput("TEXT", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[TEXTS[0].encode()]], np.object_))
        result = mine.client.infer(MODEL, [tensor])
        answer = result.get_response()
        version = answer.model_version if api is grpcclient else answer["model_version"]
        answers.append((version, result.as_numpy("EMBEDDING")))

    return call


def embedding_caller(
    embedder: Embedder, outcomes: list[tuple[int, Embeddings]]
) -> Callable[[], None]:
    """Embeds one text that may be cached and one that cannot, each alone."""

    def call() -> None:
        row = random.randrange(len(TEXTS))
        outcomes.append((row, embedder.embed(TEXTS[row])))
        embedder.embed(f"{random.random()}")

    return call


def test_swaps_under_load_are_never_mislabelled(
    built: repository.Built, other: repository.Built, settings: Settings, tmp_path: Path
) -> None:
    """Two models take turns under one name while 32 callers ask for single texts over gRPC and
    HTTP, plainly and through cached embedders, and one in process: no request fails, and every
    vector is of the space and the version that it is labelled with.
    """
    folder = tmp_path / "repository"
    repository.write(built, folder)
    own: dict[str, np.ndarray] = {}
    answers: list[tuple[str, np.ndarray]] = []
    outcomes: list[tuple[int, Embeddings]] = []
    options = free_options(models=(MODEL,))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            wheel.serve(folder, settings.python_backend, tmp_path, options)
        )
        control = stack.enter_context(grpcclient.InferenceServerClient(server.grpc_address))
        grpc, http = (
            stack.enter_context(Embedder(config=configured(url, tmp_path / f"cache{number}")))
            for number, url in enumerate((server.grpc_address, f"http://{server.http_address}"))
        )
        local = {"provider": "onnx", "model_id": MODEL, "path": str(folder), "streams": 1}
        in_process = stack.enter_context(
            Embedder(config={"models": {"m": local}, "cache": {"model_check": 0}})
        )
        for one, last in ((built, False), (other, False), (built, True)):
            if own:
                swap(one, folder, control)
            if not last:
                own[one.spec.space] = grpc.embed(TEXTS).vectors
        with contextlib.ExitStack() as load:
            for count, call in (
                (CALLERS, bare_caller(grpcclient, server.grpc_address, answers)),
                (CALLERS, bare_caller(httpclient, server.http_address, answers)),
                (CALLERS, embedding_caller(grpc, outcomes)),
                (CALLERS, embedding_caller(http, outcomes)),
                (1, embedding_caller(in_process, outcomes)),
            ):
                load.enter_context(calling(count, call))
            for one in itertools.islice(itertools.cycle((other, built)), SWAPS):
                time.sleep(0.5)
                swap(one, folder, control)
                wanted = {("triton", one.spec.space), ("onnx", one.spec.space)}
                wait_until(lambda: wanted <= {(r.provider, r.space) for _, r in list(outcomes)})
            time.sleep(1)
    assert vectors.cosine(own[built.spec.space], own[OTHER]).max() < 0.9999
    spaces = {str(one.version("fp32")): one.spec.space for one in (built, other)}
    assert {version for version, _ in answers} == set(spaces)
    for version, vector in answers:
        assert vectors.cosine(vector, own[spaces[version]][:1])[0] >= 0.99999
    for provider in ("triton", "onnx"):
        seen = {one.space for _, one in outcomes if one.provider == provider}
        assert seen == set(own)
    for row, result in outcomes:
        assert vectors.cosine(result.vectors, own[result.space][row : row + 1])[0] >= 0.99999


def configured(url: str, cache: Path) -> dict[str, Any]:
    return {
        "models": {"m": {"provider": "triton", "model_id": MODEL, "url": url}},
        "cache": {"model_check": 0, "disk": {"path": str(cache)}},
    }


def unpinned(built: repository.Built, folder: Path) -> None:
    """The built model as a repository without content numbers has it: version 1, nothing named."""
    for name in repository.family(built):
        shutil.rmtree(folder / name, ignore_errors=True)
    repository.write(built, folder)
    for name in repository.family(built):
        version_folder(folder / name).rename(folder / name / "1")
        shutil.rmtree(folder / name / "configs", ignore_errors=True)
        written = model_config.read(folder / name / "config.pbtxt")
        written.ClearField("version_policy")
        for step in written.ensemble_scheduling.step:
            step.model_version = -1
        (folder / name / "config.pbtxt").write_text(model_config.to_text(written))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_swap_without_content_numbers_is_noticed(
    built: repository.Built,
    other: repository.Built,
    settings: Settings,
    tmp_path: Path,
    scheme: str,
) -> None:
    """Where versions name no content the config tells: before and after a swap under load, vectors
    labelled with a space are that space's.
    """
    folder = tmp_path / "repository"
    unpinned(built, folder)
    outcomes: list[Embeddings] = []
    options = free_options(models=(MODEL,))
    with wheel.serve(folder, settings.python_backend, tmp_path, options) as server:
        address = server.grpc_address if scheme == "grpc" else f"http://{server.http_address}"
        with Embedder(config=configured(address, tmp_path / "cache")) as embedder:
            first = embedder.embed(TEXTS)
            assert embedder.embed(TEXTS).cached.all()
            with calling(
                4, lambda: outcomes.append(embedder.embed([*TEXTS, f"{random.random()}"]))
            ):
                time.sleep(0.5)
                unpinned(other, folder)
                with grpcclient.InferenceServerClient(server.grpc_address) as control:
                    control.load_model(MODEL)
                swapped = len(outcomes)
                time.sleep(1)
            last = embedder.embed(TEXTS)
            assert embedder.stats()["model_changes"] == 1
    assert (first.space, last.space) == (built.spec.space, OTHER)
    assert swapped < len(outcomes)
    by_space = {first.space: first.vectors, last.space: last.vectors}
    assert {result.space for result in outcomes} == set(by_space)
    for result in outcomes:
        own = by_space[result.space]
        assert vectors.cosine(result.vectors[:40], own).min() >= 0.99999
