"""Aliases: models for programs that ask Triton itself, with the inputs that they send."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network

import httpx
import litellm
import numpy as np
import pytest
import small_models
import tritonclient.http as triton
import tritonclient.http.aio as async_triton
from conftest import MODEL, free_options
from gateways import assert_alike, gateway, triton_model
from tritonclient.utils import InferenceServerException

from halimede_ops.errors import InvalidInput
from halimede_repository import configs, names
from halimede_tools.build import repository
from halimede_tools.build.plan import build, build_request
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TEXTS = ["hello world", "What is Triton?", "naïve 🦊 中文"]
LITELLM, LLAMA_INDEX = f"{MODEL}-litellm", f"{MODEL}-llamaindex"


@pytest.fixture(scope="module")
def folder(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the default model in FP32, and its aliases."""
    folder = tmp_path_factory.mktemp("aliases") / "repository"
    for name in (MODEL, *configs.read(settings.repository, MODEL).steps):
        shutil.copytree(settings.repository / name, folder / name, copy_function=shutil.copy)
    assert repository.write_aliases([MODEL], folder) == [LITELLM, LLAMA_INDEX]
    return folder


@pytest.fixture(scope="module", params=["one process", "steps"])
def aliased(
    request: pytest.FixtureRequest, settings: Settings, folder: Path
) -> Iterator[wheel.Server]:
    """A running Triton with them, each model in one process, or as an ensemble of its steps."""
    options = free_options(steps=request.param == "steps")
    run = folder.parent / request.param.replace(" ", "-")
    run.mkdir()
    with wheel.serve(folder, settings.python_backend, run, options) as running:
        yield running


def test_litellm(aliased: wheel.Server, vectors: Any) -> None:
    """Its provider `triton/`, before the server itself and through the gateway."""
    with gateway(triton_model(aliased), kserve_url=f"http://{aliased.http_address}") as running:
        for address in (f"http://{aliased.http_address}", running):
            options = {
                "model": f"triton/{LITELLM}",
                "api_base": f"{address}/v2/models/{LITELLM}/infer",
                "input": TEXTS,
            }
            asked = litellm.embedding(**options), asyncio.run(litellm.aembedding(**options))
            for answer in asked:
                assert_alike([row["embedding"] for row in answer.data], vectors(TEXTS))


def llama_index_input(kind: Any, texts: list[str]) -> Any:
    tensor = kind.InferInput("INPUT_TEXT", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, np.object_))
    return tensor


def test_llama_index(aliased: wheel.Server, vectors: Any) -> None:
    """The request of its package embeddings-nvidia-triton with its default names, made here as in
    its source: the package is not installed.
    """
    output = "OUTPUT_EMBEDDINGS"
    with triton.InferenceServerClient(aliased.http_address) as client:
        answer = client.infer(
            LLAMA_INDEX,
            [llama_index_input(triton, TEXTS)],
            outputs=[triton.InferRequestedOutput(output)],
            request_id="7",
        )
    assert_alike(answer.as_numpy(output), vectors(TEXTS))

    async def infer() -> Any:
        async with async_triton.InferenceServerClient(aliased.http_address) as client:
            return await client.infer(
                LLAMA_INDEX,
                [llama_index_input(async_triton, TEXTS)],
                outputs=[async_triton.InferRequestedOutput(output)],
            )

    assert_alike(asyncio.run(infer()).as_numpy(output), vectors(TEXTS))


def test_a_reloaded_model_keeps_its_aliases(aliased: wheel.Server, vectors: Any) -> None:
    """A deployment loads the model alone; the aliases follow it."""
    with triton.InferenceServerClient(aliased.http_address) as client:
        client.load_model(MODEL)
        answer = client.infer(LLAMA_INDEX, [llama_index_input(triton, TEXTS)])
        assert_alike(answer.as_numpy("OUTPUT_EMBEDDINGS"), vectors(TEXTS))
        texts = ["a"] * 129
        with pytest.raises(InferenceServerException, match="128"):
            client.infer(LLAMA_INDEX, [llama_index_input(triton, texts)])


def test_the_gateway_lists_the_models_alone(aliased: wheel.Server, folder: Path) -> None:
    onnx = {MODEL: {"provider": "onnx", "model_id": MODEL, "path": str(folder)}}
    for models in (triton_model(aliased), onnx):
        with gateway(models) as running:
            listed = httpx.get(f"{running}/v1/models", timeout=60).json()["data"]
            assert [model["id"] for model in listed] == [MODEL]


def test_what_a_server_loads(folder: Path) -> None:
    """What an alias calls is no step of it: it is served under its own name."""
    assert configs.models_to_load(folder) == (MODEL, LITELLM, LLAMA_INDEX)


def test_a_build_writes_them(tmp_path: Path) -> None:
    """For each precision of a model that embeds texts. A build without the option keeps them, and
    one of another space removes those of precisions that it does not contain.
    """
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    source = str(small_models.like_minilm(tmp_path / "source"))
    request = build_request(source, "small", precisions=("fp32", "fp16"), accepted=("fp16",))
    both = build_request(
        source, "small", precisions=("fp32", "fp16"), accepted=("fp16",), alias=True
    )
    assert build(both, home) == ["small", "small-fp16"]
    aliases = {f"{name}{end}" for name in ("small", "small-fp16") for end in configs.ALIASES}
    assert all(configs.is_built(home.repository / alias) for alias in aliases)
    before = {alias: (home.repository / alias / configs.CONFIG).read_bytes() for alias in aliases}
    build(request, home)
    for alias, config in before.items():
        assert (home.repository / alias / configs.CONFIG).read_bytes() == config
    build(build_request(source, "small", precisions=("fp32",), max_tokens=64), home)
    left = {path.name for path in home.repository.iterdir()} & aliases
    assert left == {f"small{end}" for end in configs.ALIASES}
    for alias in left:
        with pytest.raises(InvalidInput, match="name of a folder of small"):
            names.check_unshared(alias, home.repository)


def test_only_models_that_embed_texts_have_them(tmp_path: Path) -> None:
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    source = small_models.bert_reranker(tmp_path / "source")
    request = build_request(str(source), "ranks", precisions=("fp32",), alias=True)
    with pytest.raises(InvalidInput, match="Leave out --alias"):
        build(request, home)
    assert not (home.repository / "ranks").exists()
    with pytest.raises(InvalidInput, match="a candidate has no aliases"):
        build(request, home, candidate=True)
