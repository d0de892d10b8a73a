"""Keys of build steps: what a step uses changes its key, and nothing else does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import MODEL, ROOT

from halimede_tools.build import keys, plan, steps
from halimede_tools.settings import Settings

STEPS = ("export", "fp16", "int8", "check")
"""The modules of the build's steps."""
ALL = set(STEPS)
USERS = {
    "python_backend/halimede_engine/arithmetic.py": ALL,
    "python_backend/halimede_engine/session.py": ALL,
    "python_backend/halimede_engine/batching.py": ALL,
    "python_backend/halimede_engine/scheduler.py": set(),
    "python_backend/halimede_engine/graph.py": set(),
    "python_backend/halimede_engine/requests.py": set(),
    "python_backend/halimede_ops/cuts.py": ALL,
    "python_backend/halimede_ops/spec.py": ALL,
    "python_backend/halimede_ops/text.py": ALL,
    "python_backend/halimede_ops/image.py": {"fp16", "int8", "check"},
    "python_backend/halimede_ops/vectors.py": ALL,
    "python_backend/halimede_ops/sparse.py": ALL,
    "python_backend/halimede_ops/heads.py": ALL,
    "python_backend/halimede_ops/quantise.py": set(),
    "python_backend/pooler/model.py": set(),
    "tools/halimede_tools/build/export.py": {"export"},
    "tools/halimede_tools/build/fp16.py": {"fp16"},
    "tools/halimede_tools/build/int8.py": {"int8"},
    "tools/halimede_tools/build/check.py": {"check"},
    "tools/halimede_tools/build/towers.py": {"fp16", "int8", "check"},
    "tools/halimede_tools/build/describe.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/contents.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/loaded.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/recognise.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/files.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/activation.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/static.py": {"export", "check"},
    "tools/halimede_tools/build/graph/lookup.py": {"export"},
    "tools/halimede_tools/build/graph/tables.py": {"int8"},
    "tools/halimede_tools/build/kinds/chat.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/routes.py": set(),
    "tools/halimede_tools/build/kinds/windows.py": {"export"},
    "tools/halimede_tools/build/kinds/scores.py": {"fp16", "int8", "check"},
    "tools/halimede_tools/build/kinds/late.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/ranks.py": {"check"},
    "tools/halimede_tools/build/graph/late.py": {"export", "check"},
    "python_backend/halimede_ops/maxsim.py": {"check"},
    "tools/halimede_tools/build/kinds/sparse.py": {"export", "check"},
    "tools/halimede_tools/build/kinds/overlap.py": {"check"},
    "tools/halimede_tools/build/graph/splade.py": {"export"},
    "tools/halimede_tools/build/graph/scoring.py": {"export"},
    "tools/halimede_tools/build/checks/arguments.py": set(),
    "tools/halimede_tools/build/checks/long_texts.py": {"check"},
    "tools/halimede_tools/build/checks/space.py": {"export", "check"},
    "tools/halimede_tools/build/checks/spans.py": {"export", "check"},
    "tools/halimede_tools/build/checks/traced.py": {"export"},
    "tools/halimede_tools/build/checks/weights.py": {"export"},
    "tools/halimede_tools/build/graph/imaging.py": {"export", "check"},
    "tools/halimede_tools/build/graph/padding.py": {"export"},
    "tools/halimede_tools/build/graph/shapes.py": {"export"},
    "tools/halimede_tools/build/vision/encoder.py": {"export", "check"},
    "tools/halimede_tools/build/vision/processor.py": {"export", "check"},
    "tools/halimede_tools/build/vision/two_towers.py": {"export", "check"},
    "tools/halimede_tools/build/graph/rewrite.py": {"export", "fp16", "int8"},
    "tools/halimede_tools/build/checks/overflow.py": {"fp16"},
    "tools/halimede_tools/build/graph/packing.py": {"export", "check"},
    "tools/halimede_tools/build/graph/tracing.py": {"export"},
    "tools/halimede_tools/build/graph/activations.py": {"int8"},
    "tools/halimede_tools/build/graph/outliers.py": {"int8"},
    "tools/halimede_tools/build/graph/smoothing.py": {"int8"},
    "tools/halimede_tools/build/samples/corpus.py": {"fp16", "int8", "check"},
    "tools/halimede_tools/build/samples/data/sentences.txt": {"fp16", "int8", "check"},
    "tools/halimede_tools/build/samples/data/short.txt": {"fp16", "int8", "check"},
    "tools/halimede_tools/build/samples/pictures.py": {"fp16", "int8", "check"},
    "tools/halimede_tools/build/samples/sts.py": {"check"},
    "tools/halimede_tools/build/plan.py": set(),
    "tools/halimede_tools/build/steps.py": set(),
    "tools/halimede_tools/build/repository.py": set(),
    "tools/halimede_tools/build/candidates.py": set(),
    "tools/halimede_tools/build/model_config.py": set(),
    "tools/halimede_tools/build/fusion.py": set(),
    "tools/halimede_tools/settings.py": set(),
    "client/halimede/__init__.py": set(),
    "client/halimede/embedder.py": set(),
    "client/halimede/models/store.py": set(),
    "README.md": set(),
}
"""File → the steps that use it."""
PACKAGES = {
    "torch": {"export", "check"},
    "transformers": {"export", "check"},
    "sentence_transformers": {"export", "check"},
    "optimum": {"export"},
    "onnx": ALL,
    "nncf": {"int8"},
    "tokenizers": ALL,
    "onnxruntime": ALL,
    "numpy": ALL,
    "PIL": {"fp16", "int8", "check"},
    "rich": set(),
    "tritonclient": set(),
}
"""Package of others → the steps that use it."""


def key(step: str, folder: Path) -> str:
    """A step's key with the packages of a copied checkout."""
    roots = {path.name: path for path in folder.glob("*/halimede*")}
    return keys.code(f"halimede_tools.build.{step}", roots.__getitem__)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of our packages, to change."""
    for part in ("client", "python_backend", "tools"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_a_changed_file_changes_the_keys_of_the_steps_that_use_it(checkout: Path) -> None:
    """And of no other. Where the files lie changes nothing."""
    before = {step: key(step, checkout) for step in STEPS}
    assert before == {step: keys.code(f"halimede_tools.build.{step}") for step in STEPS}
    for name, users in USERS.items():
        path = checkout / name
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        changed = {step for step in STEPS if key(step, checkout) != before[step]}
        assert changed == users, name
        path.write_bytes(content)


def test_every_file_of_the_build_is_in_the_table() -> None:
    """So that a new one is thought of."""
    build = ROOT / "tools" / "halimede_tools" / "build"
    files = {
        str(path.relative_to(ROOT)) for path in build.rglob("*.py") if path.stat().st_size > 99
    }
    apart = {"tools/halimede_tools/build/keys.py", "tools/halimede_tools/build/download.py"}
    assert files - apart <= USERS.keys()


def test_data_files_count_by_name_and_content(checkout: Path) -> None:
    """A data file more beside a module that reads some is a change."""
    before = {step: key(step, checkout) for step in STEPS}
    (checkout / "tools/halimede_tools/build/samples/data/more.txt").write_text("more")
    assert {step for step in STEPS if key(step, checkout) != before[step]} == {
        "fp16",
        "int8",
        "check",
    }


def test_another_version_of_a_package_changes_the_keys_of_the_steps_that_import_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {step: keys.code(f"halimede_tools.build.{step}") for step in STEPS}
    version = keys.version
    for package, users in PACKAGES.items():
        monkeypatch.setattr(
            keys, "version", lambda name: "another" if name == package else version(name)
        )
        changed = {s for s in STEPS if keys.code(f"halimede_tools.build.{s}") != before[s]}
        assert changed == users, package


@pytest.mark.parametrize("step", STEPS)
def test_reading_finds_all_that_is_imported(step: str) -> None:
    """What Python has imported of ours after a step's module, a package's own file aside, was found
    by reading.
    """
    module = f"halimede_tools.build.{step}"
    code = f"import sys, {module}\nprint(*(n for n in sys.modules if n.startswith('halimede')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used = keys.uses(module).files
    imported = {name for name in done.stdout.split() if name.count(".") != 0}
    packages = {
        name
        for name in imported
        if keys.installed("halimede_tools")
        .parent.joinpath(*name.split("."), "__init__.py")
        .exists()
    }
    assert imported - packages <= used.keys()


def step_keys(
    request: plan.BuildRequest, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The key of each step of the default model, without running any."""
    found: dict[str, str] = {}

    def keep(folder: Path, title: str, step: partial[None]) -> Path:
        found[folder.name] = steps.step_key(step)
        return folder

    monkeypatch.setattr(plan, "run_step", keep)
    plan.make(request, settings.models / MODEL, settings)
    return found


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"max_tokens": 128}, {"fp32", "reference", "long-reference"}),
        ({"token_embeddings": True}, {"fp32", "reference", "long-reference"}),
        ({"late_chunking": True}, {"fp32", "reference", "long-reference"}),
        ({"trust_remote_code": True}, {"fp32", "reference", "long-reference"}),
        ({"prompts": {"query": "find: "}}, {"fp32", "reference", "long-reference"}),
        ({"calibration": ROOT / "pyproject.toml"}, {"int8"}),
        ({"sts": ROOT / "README.md"}, {"checked-fp32", "checked-fp16", "checked-int8"}),
        ({"accepted": ("int8",), "device": "cuda", "precisions": ("int8", "fp16", "fp32")}, set()),
    ],
)
def test_an_option_changes_the_keys_of_the_steps_that_take_it(
    settings: Settings, fields: dict, changed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = step_keys(plan.build_request(MODEL), settings, monkeypatch)
    after = step_keys(plan.build_request(MODEL, **fields), settings, monkeypatch)
    assert before.keys() == after.keys() == {
        "fp32", "fp16", "int8", "reference", "long-reference", "checked-fp32", "checked-fp16", "checked-int8"
    }  # fmt: skip
    assert {step for step in before if before[step] != after[step]} == changed


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    """Its path does not: a moved store keeps its steps."""

    def of(path: Path) -> str:
        return steps.step_key(partial(plan.fp16.quantise, path, "texts", None))

    first, second = tmp_path / "a", tmp_path / "elsewhere" / "b"
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text("weights")
    assert of(first) == of(second)
    (second / "model.onnx").write_text("other weights")
    assert of(first) != of(second)
    with pytest.raises(TypeError, match="its content has no key"):
        steps.step_key(partial(plan.fp16.quantise, object(), "texts", None))
