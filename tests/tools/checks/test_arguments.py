"""What can be known to fail is refused before any work, and names cannot collide."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
from conftest import MODEL, free_options

from halimede import Embedder
from halimede_ops.errors import (
    BuildError,
    DeployError,
    HalimedeError,
    InvalidInput,
    ModelNotFound,
    QualityError,
)
from halimede_repository import names
from halimede_tools.bench import quality, tune
from halimede_tools.build import fusion, plan
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus, pictures
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings


def no_work(*_: Any, **__: Any) -> None:
    raise AssertionError("work began")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a build of which any work is a failure of the test."""
    monkeypatch.setattr(plan, "stages", no_work)
    return Settings(home=tmp_path / "home", repository=tmp_path / "repository")


def texts(folder: Path, count: int) -> Path:
    path = folder / "texts.txt"
    path.write_text("\n".join(f"text {number}" for number in range(count)))
    return path


def unreadable_picture(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir()
    for index, file in enumerate(pictures.calibration_pictures(pictures.LEAST_PICTURES)):
        (images / f"{index:03}.png").write_bytes(file)
    (images / "007.png").write_bytes(b"no picture")
    return images


def few_pictures(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir()
    (images / "0.png").write_bytes(pictures.calibration_pictures(1)[0])
    return images


def malformed(folder: Path) -> Path:
    path = folder / "sts.tsv"
    path.write_text("a\tb\n1\t2\n")
    return path


@pytest.mark.parametrize(
    ("field", "make", "message"),
    [
        ("calibration", lambda folder: texts(folder, 3), "has 3 different texts.*give 100 or more"),
        ("calibration", lambda folder: folder / "none.txt", "cannot be read"),
        ("calibration_images", few_pictures, "has 1 files; give 50"),
        ("calibration_images", unreadable_picture, "file 7 of the folder .* is no picture"),
        ("sts", malformed, "columns score"),
        ("sts", lambda folder: folder / "none.tsv", "STS file cannot be read"),
    ],
    ids=["few texts", "no file", "few pictures", "no picture", "malformed STS", "no STS"],
)
def test_files_of_a_build_are_read_first(
    home: Settings, tmp_path: Path, field: str, make: Callable[[Path], Path], message: str
) -> None:
    wanted: Any = {field: make(tmp_path)}
    with pytest.raises(InvalidInput, match=message):
        build(build_request(MODEL, **wanted), home)


def test_calibration_texts_count_once(tmp_path: Path) -> None:
    """Copies of one text give no more ranges than one; as many texts as are wanted are taken."""
    (tmp_path / "same.txt").write_text("one text\n" * 500)
    with pytest.raises(InvalidInput, match="1 different texts"):
        corpus.calibration(tmp_path / "same.txt")
    assert len(corpus.calibration(texts(tmp_path, corpus.LEAST_TEXTS))) == corpus.LEAST_TEXTS


def test_a_candidate_of_what_is_not_served_is_refused_first(home: Settings) -> None:
    with pytest.raises(DeployError, match="not in the repository.*without --candidate"):
        build(build_request(MODEL), home, candidate=True)


def test_an_unwritable_repository_is_refused_first(home: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unwritable = home.model_copy(update={"repository": tmp_path / "file" / "repository"})
    with pytest.raises(BuildError, match="HALIMEDE_REPOSITORY"):
        build(build_request(MODEL), unwritable)


def test_a_failed_int8_is_what_a_candidate_without_change_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that everything is served already: the precision that was to be replaced is left out."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    source = str(small_models.like_minilm(tmp_path / "source"))
    build(build_request(source, "m", precisions=("fp32", "fp16"), accepted=("fp16",)), home)
    again = build_request(source, "m", precisions=("fp32", "fp16"))
    # The graph weighs as much as the weights of so small a model: FP16 misses its size.
    with pytest.raises(QualityError, match="no candidate of m was written: fp16 misses its bar"):
        build(again, home, candidate=True)
    with pytest.raises(DeployError, match="no candidate was written: m is served in this very"):
        build(build_request(source, "m", precisions=("fp32",)), home, candidate=True)


def served(folder: Path, *models: str) -> Path:
    """A repository with a folder of each model."""
    for model in models:
        (folder / model / "1").mkdir(parents=True)
        (folder / model / "1" / "spec.json").write_text(json.dumps({"name": model}))
    return folder


SUFFIXED = [f"m-{suffix}" for suffix in names.SUFFIXES] + ["m-image-int8-onnx", "m-fp16-candidate"]


@pytest.mark.parametrize("name", SUFFIXED)
def test_names_that_share_folders_are_refused_in_either_order(name: str, tmp_path: Path) -> None:
    for first, second in ((name, "m"), ("m", name)):
        with pytest.raises(InvalidInput, match=rf"{name} is the name of a folder of m\b"):
            names.check_unshared(second, served(tmp_path / first, first))


def test_names_that_share_no_folder_are_accepted(tmp_path: Path) -> None:
    """The model's own name, and names that only resemble a folder's."""
    folder = served(tmp_path, "m", "other-int8")
    for name in (
        "m",
        "other-int8",
        "m-int4",
        "m-int8x",
        "m2-int8",
        "mint8",
        "other-fp16",
        "M-int8",
    ):
        names.check_unshared(name, folder)


def test_a_build_refuses_a_name_of_another_models_folder(home: Settings) -> None:
    served(home.repository, MODEL)
    with pytest.raises(InvalidInput, match="--name"):
        build(build_request(MODEL, f"{MODEL}-int8"), home)
    with pytest.raises(InvalidInput, match="--name"):
        fusion.write_untrained(f"{MODEL}-pooler", MODEL, MODEL, 0.5, home.repository)


def test_a_fusion_and_a_model_cannot_have_one_name(tmp_path: Path) -> None:
    for name, backend in (("model", "onnxruntime"), ("fusion", "fusion")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(f'backend: "{backend}"\n')
    with pytest.raises(InvalidInput, match="has a model of this name"):
        names.check_unshared("model", tmp_path, fusion=True)
    with pytest.raises(InvalidInput, match="has a fusion of this name"):
        names.check_unshared("fusion", tmp_path)
    names.check_unshared("fusion", tmp_path, fusion=True)
    names.check_unshared("model", tmp_path)


def test_every_folder_of_a_model_is_known_to_the_names(tmp_path: Path) -> None:
    """A suffix that the build writes and `names` does not know would let names collide."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    source = small_models.clip(tmp_path / "source")
    [texts, images] = plan.make(
        build_request(str(source), "m", precisions=("fp32",)), tmp_path / "store", home
    )
    for tower, precision in itertools.product((texts, images), plan.PRECISIONS):
        for pin in (tower.ensemble(precision), *tower.steps(precision).values()):
            assert re.fullmatch(rf"m(-({'|'.join(names.SUFFIXES)}))*", pin.model), pin.model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modèle", "letters a to z"),
        ("模型", "letters a to z"),
        ("m" * 300, "name has 300 letters"),
        ("my model", "letters a to z"),
        ("-m", "letters a to z"),
        (".m", "letters a to z"),
        ("..", "letters a to z"),
        ("m\n", "letters a to z"),
        ("", "letters a to z"),
    ],
)
def test_names_that_cannot_be_served_are_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        names.check_servable(name)
    if name:
        with pytest.raises(InvalidInput, match=message):
            build_request(MODEL, name)


def test_the_longest_name_is_served(tmp_path: Path) -> None:
    """With every kind of letter, by a real Triton, as an ensemble of steps."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    name = "_aZ0.9-".ljust(names.MAX_LETTERS, "m")
    source = small_models.like_minilm(tmp_path / "source")
    build(build_request(str(source), name, precisions=("fp32",)), home)
    options = free_options(models=(name,), steps=True)
    (tmp_path / "run").mkdir()
    with wheel.serve(home.repository, home.python_backend, tmp_path / "run", options):
        with Embedder(f"127.0.0.1:{options.grpc_port}", name) as embedder:
            assert embedder.embed(["a text"]).vectors.shape == (1, 64)


@pytest.mark.parametrize(
    ("precisions", "error"), [(("fp32", "int4"), InvalidInput), (("fp32", "int8"), ModelNotFound)]
)
def test_tune_and_quality_look_for_all_precisions_first(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precisions: tuple[str, ...],
    error: type[HalimedeError],
) -> None:
    for name in (MODEL, f"{MODEL}-onnx", f"{MODEL}-tokenizer", f"{MODEL}-pooler"):
        (tmp_path / name).symlink_to((settings.repository / name).resolve())
    partly = settings.model_copy(update={"repository": tmp_path})
    monkeypatch.setattr(tune, "measure", no_work)
    with pytest.raises(error):
        tune.tune(partly, MODEL, precisions, 1)
    if error is ModelNotFound:
        monkeypatch.setattr(quality.check, "reference", no_work)
        with pytest.raises(error):
            quality.quality(partly, MODEL, precisions, texts(tmp_path, 5))


def test_pairs_are_counted_before_they_are_embedded(tmp_path: Path) -> None:
    pair = {"text": ["a", "b"], "image": ["a.png", "b.png"]}
    (tmp_path / "pairs").write_text("\n".join([json.dumps(pair)] * 5))
    with pytest.raises(InvalidInput, match="4 pairs are too few to train on; give 20"):
        fusion._read(tmp_path / "pairs")
