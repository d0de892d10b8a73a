"""Build: one model's whole way from its name to its folders in the repository.

Download → export → optimise → quantise → check → write. Every step is done once: a second
build does what is missing and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from halimede_ops import session, text
from halimede_ops.errors import BuildError
from halimede_ops.spec import ModelSpec
from tools import catalogue, corpus, repository
from tools.check import BARS, TOOLS
from tools.describe import describe
from tools.download import download, verify
from tools.settings import Settings
from tools.steps import console, key_of, once, sha256

PRECISIONS = tuple(BARS)
STEP_MODULES = ("export", "quantise", "corpus", "check")


def build(name: str, settings: Settings) -> list[str]:
    """Build the catalogue's model `name` in every precision; the names it is served under.

    Raises:
        ModelNotFound: the catalogue has no such row.
        BuildError: a step failed, or another build of the model runs; the repository is as it was.
    """
    model = catalogue.find(name)
    folder = settings.home / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            console.print(f"[bold]{name}[/]")
            built = _steps(model, folder)
            ensembles = repository.write(built, settings.repository)
            console.print(f"  [green]✓[/] write: {', '.join(ensembles)}")
            return ensembles
    except Timeout:
        raise BuildError(
            f"another build of {name} is running; wait for it, then run the same command again"
        ) from None


def _steps(model: catalogue.Model, folder: Path) -> repository.Built:
    source = once(
        folder / "source",
        key_of("download", model.weights_sha256),
        "download",
        lambda target: download(model, target),
    )
    verify(model, source)
    spec = describe(source, model.name)
    versions = [f"{tool}={importlib.metadata.version(tool)}" for tool in TOOLS]
    # A step is done again when its own code changes.
    code = {name: sha256(Path(__file__).parent / f"{name}.py") for name in STEP_MODULES}
    exported = once(
        folder / "fp32",
        key_of(code["export"], spec.to_json(), *versions),
        "export to ONNX, optimise (fp32)",
        lambda target: _export(source, spec, target),
    )
    fp32_digest = sha256(exported / session.FILE_NAME)
    fp16 = once(
        folder / "fp16",
        key_of(code["quantise"], fp32_digest, *versions),
        "quantise (fp16)",
        lambda target: _to_fp16(exported, target),
    )
    int8 = once(
        folder / "int8",
        key_of(code["quantise"], code["corpus"], fp32_digest, *model.int8_kept_fp32, *versions),
        "quantise (int8)",
        lambda target: _to_int8(exported, spec, model.int8_kept_fp32, target),
    )
    files = {
        precision: step / session.FILE_NAME
        for precision, step in (("fp32", exported), ("fp16", fp16), ("int8", int8))
    }
    checked = once(
        folder / "checked",
        key_of(code["check"], code["corpus"], spec.space, *map(sha256, files.values()), *versions),
        "check against sentence-transformers",
        lambda target: _check(source, exported, files, spec, target),
    )
    return repository.Built(
        spec=spec,
        tokenizer=exported / text.FILE_NAME,
        models=files,
        quality={
            precision: json.loads((checked / f"{precision}.json").read_text())
            for precision in files
        },
    )


# The heavy imports (torch, nncf) wait until a step really runs: a second build takes seconds.


def _export(source: Path, spec: ModelSpec, target: Path) -> None:
    from tools.export import export

    export(source, spec, target)


def _to_fp16(exported: Path, target: Path) -> None:
    from tools.quantise import to_fp16

    to_fp16(exported / session.FILE_NAME, target / session.FILE_NAME)


def _to_int8(exported: Path, spec: ModelSpec, kept_fp32: Sequence[str], target: Path) -> None:
    from tools.quantise import to_int8

    fp32, int8 = exported / session.FILE_NAME, target / session.FILE_NAME
    to_int8(fp32, exported, spec, corpus.calibration_texts(), kept_fp32, int8)


def _check(
    source: Path, exported: Path, files: dict[str, Path], spec: ModelSpec, target: Path
) -> None:
    from tools.check import check, reference

    texts = corpus.check_texts()
    expected = reference(source, texts)
    for precision, path in files.items():
        record = check(precision, path, files["fp32"], exported, spec, texts, expected)
        console.print(f"    {_summary(record)}")
        (target / f"{precision}.json").write_text(json.dumps(record, indent=2))


def _summary(record: dict[str, Any]) -> str:
    return (
        f"{record['precision']}: mean cosine {record['mean_cosine']:.6f}, lowest "
        f"{record['min_cosine']:.4f}, invariance {record['invariance']:.6f}, "
        f"{record['size_bytes'] / 1e6:.1f} MB ({record['size_ratio']:.2f})"
    )
