"""Write: a built model to its folders in the Triton model repository.

Every file is written beside its place and renamed into it, the config last: a killed build
leaves each file either as it was or as it will be, and what is already equal is not touched.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halimede_ops import session, spec, text
from halimede_ops.spec import ModelSpec
from tools import config

VERSION = "1"
SUFFIXES = {"fp32": "", "fp16": "-fp16", "int8": "-int8"}
WARMUP_TEXT = "The first request of a server should be as fast as the second."


@dataclasses.dataclass(frozen=True)
class Built:
    """What the build of one model gives."""

    spec: ModelSpec
    tokenizer: Path
    """`tokenizer.json`."""
    models: Mapping[str, Path]
    """Precision → model.onnx."""
    quality: Mapping[str, dict[str, Any]]
    """Precision → quality record."""
    device: str = config.CPU
    """What the ONNX step's config asks for."""


def served_name(model: str, precision: str) -> str:
    """Name that a precision is served under: FP32 has no suffix."""
    return model + SUFFIXES[precision]


def write(built: Built, repository: Path) -> list[str]:
    """Write all folders of a built model; the names of its ensembles."""
    name = built.spec.name
    _unpublish_stale(built, repository)
    tokenizer, pooler = f"{name}-tokenizer", f"{name}-pooler"
    write_tokenizer(built, repository / tokenizer)
    write_pooler(built, repository / pooler)
    ensembles = []
    for precision, model in built.models.items():
        ensemble = served_name(name, precision)
        onnx = f"{ensemble}-onnx"
        write_onnx(built, precision, model, repository / onnx)
        steps = {"tokenizer": tokenizer, "onnx": onnx, "pooler": pooler}
        write_ensemble(built, precision, steps, repository / ensemble)
        ensembles.append(ensemble)
    return ensembles


def _unpublish_stale(built: Built, repository: Path) -> None:
    """Remove precisions that this build does not give and that were built for another space: they
    would run behind a tokenizer that is no longer theirs.
    """
    for precision in SUFFIXES:
        ensemble = repository / served_name(built.spec.name, precision)
        if precision in built.models or not (ensemble / "config.pbtxt").exists():
            continue
        if config.space(ensemble / "config.pbtxt") != built.spec.space:
            for folder in (ensemble, ensemble.with_name(f"{ensemble.name}-onnx")):
                (folder / "config.pbtxt").unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def write_tokenizer(built: Built, folder: Path) -> None:
    """The folder of the tokenizer step."""
    _copy(built.tokenizer, folder / VERSION / text.FILE_NAME)
    _write_text(built.spec.to_json(), folder / VERSION / spec.FILE_NAME)
    _write_bytes(_bytes_tensor(WARMUP_TEXT), folder / "warmup" / "text")
    _write_bytes(_bytes_tensor("query"), folder / "warmup" / "input_type")
    _write_text(config.to_text(config.tokenizer(folder.name, built.spec)), folder / "config.pbtxt")


def write_onnx(built: Built, precision: str, model: Path, folder: Path) -> None:
    """The folder of the ONNX step of one precision."""
    longest = max(config.warm_lengths(built.spec))
    for file in session.files(model):
        _copy(file, folder / VERSION / file.name)
    # Small ids that every vocabulary has; Triton reads as much as each sample's shape takes.
    _write_bytes((np.arange(longest) % 100).astype("<i8").tobytes(), folder / "warmup/input_ids")
    _write_bytes(np.ones(longest, "<i8").tobytes(), folder / "warmup/attention_mask")
    written = config.onnx(folder.name, built.spec, precision, built.device)
    _write_text(config.to_text(written), folder / "config.pbtxt")


def write_pooler(built: Built, folder: Path) -> None:
    """The folder of the pooler step."""
    _write_text(built.spec.to_json(), folder / VERSION / spec.FILE_NAME)
    _write_bytes(struct.pack("<i", built.spec.dims), folder / "warmup" / "dimensions")
    _write_text(config.to_text(config.pooler(folder.name, built.spec)), folder / "config.pbtxt")


def write_ensemble(built: Built, precision: str, steps: Mapping[str, str], folder: Path) -> None:
    """The folder of the ensemble of one precision, with its spec and quality record."""
    record = built.quality[precision]
    quality = json.dumps(record, indent=2) + "\n"
    written = config.ensemble(folder.name, built.spec, precision, steps, record.get("missed", ()))
    _write_text(built.spec.to_json(), folder / VERSION / spec.FILE_NAME)
    _write_text(quality, folder / VERSION / "quality.json")
    _write_text(config.to_text(written), folder / "config.pbtxt")


def _bytes_tensor(value: str) -> bytes:
    """One BYTES element as Triton reads it from a file: 4-byte length, then the bytes."""
    encoded = value.encode()
    return struct.pack("<I", len(encoded)) + encoded


def _write_text(content: str, path: Path) -> None:
    _write_bytes(content.encode(), path)


def _write_bytes(content: bytes, path: Path) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    part = _part(path)
    part.write_bytes(content)
    part.replace(path)


def _copy(source: Path, path: Path) -> None:
    if path.exists() and (path.samefile(source) or filecmp.cmp(source, path, shallow=False)):
        return
    part = _part(path)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # another file system
        shutil.copyfile(source, part)
    part.replace(path)


def _part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")
