"""Build: one model's whole way from its name to its folders in the repository.

Download → export → optimise → quantise → check → write. Every step is done once: a second
build does what is missing and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
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
    exported = once(
        folder / "fp32",
        key_of("export", spec.to_json(), *versions),
        "export to ONNX, optimise (fp32)",
        lambda target: _export(source, spec, target),
    )
    fp32_digest = sha256(exported / session.FILE_NAME)
    files = {"fp32": exported / session.FILE_NAME}
    quantisers: dict[str, Callable[[Path, ModelSpec, Path], None]] = {
        "fp16": _to_fp16,
        "int8": _to_int8,
    }
    for precision, quantise in quantisers.items():
        done = once(
            folder / precision,
            key_of(precision, fp32_digest, *versions),
            f"quantise ({precision})",
            lambda target, quantise=quantise: quantise(exported, spec, target),  # type: ignore[misc]
        )
        files[precision] = done / session.FILE_NAME
    checked = once(
        folder / "checked",
        key_of("check", spec.space, *[sha256(path) for path in files.values()], *versions),
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


def _to_fp16(exported: Path, spec: ModelSpec, target: Path) -> None:
    from tools.quantise import to_fp16

    to_fp16(exported / session.FILE_NAME, target / session.FILE_NAME)


def _to_int8(exported: Path, spec: ModelSpec, target: Path) -> None:
    from tools.quantise import to_int8

    fp32 = exported / session.FILE_NAME
    to_int8(fp32, exported, spec, corpus.calibration_texts(), target / session.FILE_NAME)


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
