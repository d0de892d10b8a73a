"""The model store, and builds that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import small_models
from conftest import free_options
from filelock import FileLock
from safetensors.torch import load_file, save_file

from halimede import Embedder
from halimede.models import catalogue, store
from halimede_engine import session
from halimede_ops import spec, vectors
from halimede_ops.errors import InvalidInput
from halimede_repository import configs
from halimede_tools.build import model_config, steps
from halimede_tools.build.check import reference
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.towers import Engine, text_rows
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KILLS = 20
BUILDERS = multiprocessing.get_context("forkserver")
"""Starts builds that have their libraries: a kill hits what they do, not what they import."""
BUILDERS.set_forkserver_preload(
    [
        "halimede_tools.build.plan",
        "halimede_tools.build.graph.tracing",
        "onnxruntime.transformers.float16",
    ]
)
TEXTS = ["hello world", "a second text of some more words", "", "漢字"]


def make(models: Path, name: str, size_bytes: int, used: float) -> None:
    """A model of one step in the store, last built at `used`."""
    steps.cached_step(
        models / name / "fp32",
        "key",
        "step",
        lambda folder: (folder / "model.onnx").write_bytes(bytes(size_bytes)) and None,
    )
    for file in (store.LOCK, store.USED):
        (models / name / file).touch()
    os.utime(models / name / store.USED, (used, used))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of about 10,000 bytes: `old`, `mid`, `new`."""
    for used, name in enumerate(("old", "mid", "new"), start=1):
        make(tmp_path / "models", name, 10_000, used)
    return tmp_path / "models"


def test_store_lists_the_last_used_first(models: Path, tmp_path: Path) -> None:
    found = store.stored(models, tmp_path)
    assert [model.name for model in found] == ["new", "mid", "old"]
    assert all(10_000 < model.size_bytes < 11_000 for model in found)
    assert all(model.steps == ("fp32",) and not model.served for model in found)


def test_prune_evicts_the_longest_unused(models: Path, tmp_path: Path) -> None:
    evicted = store.prune(models, tmp_path, limit_bytes=22_000)
    assert [model.name for model in evicted] == ["old"]
    assert not (models / "old").exists()


def test_prune_never_evicts_what_is_served_or_built(models: Path, tmp_path: Path) -> None:
    """A served model stays, by its config or by a repository's link to its file; so does one
    whose build runs, and the one that was just built.
    """
    make(models, "building", 10_000, 0)
    (tmp_path / "repository" / "old-tokenizer").mkdir(parents=True)
    (tmp_path / "repository" / "old-tokenizer" / "config.pbtxt").touch()
    os.link(models / "mid" / "fp32" / "model.onnx", tmp_path / "served.onnx")
    with FileLock(models / "building" / store.LOCK):
        evicted = store.prune(models, tmp_path / "repository", limit_bytes=0, keep="new")
    assert evicted == []
    assert len(store.stored(models, tmp_path)) == 4


def test_verify_names_damaged_files(models: Path) -> None:
    assert store.verify(models) == {}
    (models / "mid" / "fp32" / "model.onnx").write_bytes(b"other")
    assert store.verify(models) == {"mid": ["fp32/model.onnx"]}
    with pytest.raises(InvalidInput, match="not in the store"):
        store.verify(models, "unknown")


def halimede(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HALIMEDE_HOME": str(home), "HALIMEDE_REPOSITORY": str(home)}
    command = [str(Path(sys.executable).with_name("halimede")), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_store_commands(models: Path, tmp_path: Path) -> None:
    """`ls`, `verify` and `prune` say in JSON what the store holds, what is damaged, what went."""
    listed = json.loads(halimede("store", "ls", "--json", home=tmp_path).stdout)
    assert [row["model"] for row in listed] == ["new", "mid", "old"]
    assert halimede("store", "verify", home=tmp_path).returncode == 0
    (models / "new" / "fp32" / "model.onnx").write_bytes(b"other")
    damaged = halimede("store", "verify", "--json", home=tmp_path)
    assert damaged.returncode == 1
    assert json.loads(damaged.stdout) == [{"model": "new", "damaged": "fp32/model.onnx"}]
    pruned = halimede("store", "prune", "--limit-gib", "0", "--json", home=tmp_path)
    assert {row["model"] for row in json.loads(pruned.stdout)} == {"new", "mid", "old"}


def test_catalogue_command(tmp_path: Path) -> None:
    """`models --available` lists and filters the catalogue without a server."""
    shown = halimede("models", "--available", "--json", home=tmp_path)
    assert len(json.loads(shown.stdout)) == len(catalogue.models())
    code = halimede("models", "--available", "--use-case", "code", "--json", home=tmp_path)
    assert [row["name"] for row in json.loads(code.stdout)] == ["codebert-base"]


def start_build(folder: Path, home: Settings) -> BaseProcess:
    """A build of `folder` as `m`."""
    wanted = build_request(str(folder), "m", precisions=("fp32", "fp16"), accepted=("fp16",))
    process = BUILDERS.Process(target=build, args=(wanted, home))
    process.start()
    return process


def run_build(folder: Path, home: Settings) -> None:
    """Such a build, to its end."""
    process = start_build(folder, home)
    process.join()
    assert process.exitcode == 0


def served_vectors(repository: Path) -> np.ndarray:
    """Vectors of the repository's own files, once every precision agrees on the space."""
    facts = spec.load(configs.read(repository, "m").folder)
    found = []
    for name in ("m", "m-fp16"):
        served = configs.read(repository, name)
        tokenizer, onnx = served.steps["m-tokenizer"], served.steps[f"{name}-onnx"]
        assert model_config.space(repository / name / "config.pbtxt") == facts.space
        assert spec.load(served.folder) == spec.load(tokenizer) == facts
        rows = text_rows(tokenizer, facts)
        found.append(Engine(onnx / session.FILE_NAME, rows, facts).embed(TEXTS))
    assert vectors.cosine(*found).min() > 0.999
    return found[0]


def test_killed_builds_leave_what_was_served(tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of builds of two states of one model in turn: the repository
    always serves one of the two whole, a real Triton too, and the next build completes.
    """
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    sources = [small_models.like_minilm(tmp_path / "a")]
    sources.append(Path(shutil.copytree(sources[0], tmp_path / "b")))
    state = load_file(sources[1] / "model.safetensors")
    state["embeddings.word_embeddings.weight"] *= -1
    save_file(state, sources[1] / "model.safetensors", metadata={"format": "pt"})
    expected = [reference(source, TEXTS, ModelOptions("m")) for source in sources]

    for source in sources:  # The first waits for the libraries: the second tells the time.
        began = time.monotonic()
        run_build(source, home)
        whole_s = time.monotonic() - began
    chance = random.Random(5)
    serving, kills = 1, 0
    while kills < KILLS:
        building = start_build(sources[1 - serving], home)
        building.join(chance.uniform(0, whole_s))
        building.kill()
        building.join()
        kills += building.exitcode != 0
        assert building.exitcode in (0, -signal.SIGKILL)
        got = served_vectors(home.repository)
        matches = [vectors.cosine(got, vector).min() > 0.9999 for vector in expected]
        assert matches.count(True) == 1
        serving = matches.index(True)
        if kills % 10 == 0:
            assert_triton_serves(home, tmp_path, expected[serving])
    run_build(sources[1 - serving], home)
    assert_triton_serves(home, tmp_path, expected[1 - serving])


def assert_triton_serves(home: Settings, folder: Path, expected: np.ndarray) -> None:
    """A real Triton on the repository gives these vectors."""
    options = free_options()
    run = folder / f"run-{options.grpc_port}"
    run.mkdir()
    with wheel.serve(home.repository, home.python_backend, run, options):
        with Embedder(f"127.0.0.1:{options.grpc_port}", "m") as embedder:
            assert vectors.cosine(embedder.embed(TEXTS).vectors, expected).min() > 0.9999
