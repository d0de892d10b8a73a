"""Write: a built model to its folders in the Triton model repository.

A version folder is numbered by what it was built from, an ensemble pins the version of every step,
and every config names the versions that it serves: the number that an answer carries names the
content that made it. A version folder also keeps the config that it is served with, so any version
on disk can be served again. A new version is placed beside the old; then three moves: the steps
serve it as well, the ensembles go over to it, the steps let go of the old. Every file is renamed
into its place: a killed build leaves ensembles that are wholly the old or wholly the new, and what
is already equal is not touched.
"""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from halimede_ops import fusion, spec, text
from halimede_repository import configs
from halimede_engine import session
from halimede_repository import checksums
from halimede_ops.errors import InvalidModel
from halimede_ops.fusion import Fusion
from halimede_ops.spec import ModelSpec
from halimede_tools.build import model_config
from halimede_tools.build.samples import pictures
from halimede_tools.build.model_config import Pin

RECIPE = 4
"""To be raised when the build makes another graph, or other vectors, of the same weights, precision
and options."""
SUFFIXES = {"fp32": "", "fp16": "-fp16", "int8": "-int8"}
ONE_PROCESS = f"{configs.ONE_PROCESS}.pbtxt"
"""File of an ensemble's second config, in `configs/` and in its version folders."""
FIRST_NUMBER = 10**11
"""Numbers have twelve digits: never those of an order, exact in JSON, short enough to read."""
WARMUP_TEXT = b"The first request of a server should be as fast as the second."
SPECIAL_TOKENS = 2
"""Tokens that most tokenizers put around a text: so much shorter are the warm-up texts."""
WARMUP_IMAGE = pictures.encoded(Image.new("RGB", (1, 1)), pictures.Form("BMP", "RGB"))
PREVIOUS = "previous"
"""File in an ensemble's folder: the version that was served before, to go back to."""
TUNED = "tuned.json"
"""File in a version folder of an ONNX step: what `tools tune` found for this machine, and how."""
IMAGE_SUFFIX = "-image"
"""Of what embeds a model's images, in front of the precision's."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What the build gives of one model's texts, or of its images."""

    spec: ModelSpec
    tokenizer: Path | None = None
    """`tokenizer.json`; None: this is what embeds the model's images."""
    models: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Precision → model.onnx."""
    quality: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Precision → quality record."""
    device: str = model_config.CPU
    """What the ONNX step's config asks for."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Precision → digest of all that its vectors depend on besides spec, precision and RECIPE."""
    twins: tuple[str, ...] = ()
    """Precisions in which the model's other inputs are embedded: a text's are images."""
    suffix: str = ""
    """Behind the name of each of its folders: `configs.CANDIDATE` where it may follow a model."""

    @property
    def name(self) -> str:
        """Name that FP32 is served under, without the suffix."""
        return self.spec.name + (IMAGE_SUFFIX if self.tokenizer is None else "")

    @property
    def names(self) -> list[str]:
        """Names of its ensembles."""
        return [served_name(self.name, precision) + self.suffix for precision in self.models]

    @property
    def versions(self) -> dict[str, int]:
        """Ensemble → its version."""
        return dict(zip(self.names, map(self.version, self.models), strict=True))

    def twin(self, precision: str) -> str:
        """Name of the ensemble that embeds the model's other inputs; empty where there is none."""
        if not self.twins:
            return ""
        name = self.spec.name + (IMAGE_SUFFIX if self.tokenizer else "")
        embedded = precision if precision in self.twins else self.twins[0]
        return served_name(name, embedded) + self.suffix

    def version(self, precision: str) -> int:
        """Version of an ensemble: another whenever one of its steps is."""
        return number(*(str(pin.version) for pin in self.steps(precision).values()))

    def steps(self, precision: str) -> dict[str, Pin]:
        """The steps of an ensemble, each with the version that it is made of."""
        facts, options = _facts(self.spec), self.options.get(precision, "")
        shared = number(facts)
        onnx = f"{served_name(self.name, precision)}-onnx"
        first = "tokenizer" if self.tokenizer else "pixels"
        return {
            first: Pin(f"{self.name}-{first}{self.suffix}", shared),
            "onnx": Pin(onnx + self.suffix, number(facts, precision, options)),
            "pooler": Pin(f"{self.spec.name}-pooler{self.suffix}", shared),
        }


def number(*facts: str) -> int:
    """The version number of what is built from these facts: twelve digits, positive.

    Facts are what goes into the build, not the bytes that come out: an INT8 file differs between
    CPUs and a graph between releases of PyTorch, while space and precision stay what they are.
    """
    digest = hashlib.sha256("\0".join((str(RECIPE), *facts)).encode()).digest()
    return FIRST_NUMBER + int.from_bytes(digest, "big") % (9 * FIRST_NUMBER)


def _facts(spec: ModelSpec) -> str:
    """What a spec says, without what every model has: a new field is no new version of those that
    do not use it.
    """
    plain = ModelSpec("", "", 0, 0, normalised=False, prompts={})
    said = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != getattr(plain, field.name)
    }
    return json.dumps(said, sort_keys=True, default=dataclasses.asdict)


def served_name(model: str, precision: str) -> str:
    """Name that a precision is served under: FP32 has no suffix."""
    return model + SUFFIXES[precision]


def write(built: Built, repository: Path) -> list[str]:
    """Write all folders of a built model; the names of its ensembles.

    Versions that were served until now stay on disk for a server that still runs them, older ones
    go.
    """
    place(built, repository)
    remember(built.versions, repository)
    add(built.versions, repository)
    switch(built.versions, repository)
    _unpublish_stale(built, repository)
    release(built.versions, repository)
    prune(built.versions, repository)
    return built.names


def family(built: Built) -> list[str]:
    """Names of all folders of a built model: its steps, then its ensembles."""
    steps = {pin.model: None for one in built.models for pin in built.steps(one).values()}
    return [*steps, *built.names]


def place(built: Built, repository: Path) -> None:
    """Write the version folders, each with the config that it is served with; none is served yet
    that was not before.
    """
    for precision, model in built.models.items():
        steps = built.steps(precision)
        if built.tokenizer is None:
            _place_pixels(built, steps["pixels"], repository)
            _place_vision(built, precision, model, steps["onnx"], repository)
        else:
            _place_tokenizer(built, built.tokenizer, steps["tokenizer"], repository)
            _place_onnx(built, precision, model, steps["onnx"], repository)
        _place_pooler(built, steps["pooler"], repository)
        _place_ensemble(built, precision, repository)


def add(versions: Mapping[str, int], repository: Path) -> None:
    """First move: the steps of these versions of ensembles serve them, beside what is pinned."""
    for pin in steps(versions, repository):
        _serve(pin, {pin.version} | pinned(repository, pin.model), repository)


def switch(versions: Mapping[str, int], repository: Path, share: float | None = None) -> None:
    """Second move: these versions of ensembles are the served ones, of candidates with this share
    of their model's requests.

    All files are renamed at the end, one right after the other: a process that is killed among
    these renames leaves each ensemble whole, but some of another build than the rest.
    """
    changed = {}
    for name, version in versions.items():
        folder = repository / name
        for kept, path in (
            (configs.CONFIG, folder / configs.CONFIG),
            (ONE_PROCESS, folder / "configs" / ONE_PROCESS),
        ):
            if (folder / str(version) / kept).exists():
                written = model_config.read(folder / str(version) / kept)
                taking = written if share is None else model_config.taking(written, share)
                changed[path] = model_config.to_text(taking).encode()
    _write_all(changed)


def release(versions: Mapping[str, int], repository: Path) -> None:
    """Third move: the steps of these versions serve what ensembles pin, and nothing else."""
    for pin in steps(versions, repository):
        _serve(pin, pinned(repository, pin.model), repository)


def steps(versions: Mapping[str, int], repository: Path) -> list[Pin]:
    """What these versions of ensembles are made of, each once.

    Raises:
        InvalidModel: a version's folder does not tell.
    """
    found: dict[Pin, None] = {}
    for name, version in versions.items():
        try:
            written = (repository / name / str(version) / configs.CONFIG).read_text()
        except OSError:
            raise InvalidModel(
                f"version {version} of {name} is not on disk as it was served. Build it again."
            ) from None
        found |= {Pin(*pin): None for pin in configs.steps(written).items()}
    return list(found)


def remember(versions: Mapping[str, int], repository: Path) -> None:
    """Note of each ensemble which version is served now, before another one is."""
    for name, version in versions.items():
        for before in served(repository / name) - {version}:
            _write_text(f"{before}\n", repository / name / PREVIOUS)


def previous(model: Path) -> int | None:
    """The version that an ensemble served before; None where there is none on disk."""
    try:
        version = int((model / PREVIOUS).read_text())
    except (OSError, ValueError):
        return None
    return version if version in configs.stored_versions(model) else None


def tune(name: str, found: Mapping[str, Any], repository: Path) -> None:
    """Serve the version that an ensemble has now with the `choice` of what was found, and note it;
    a build keeps it as long as it gives the same version.

    Raises:
        ModelNotFound: the repository has no such model.
    """
    pinned = configs.read(repository, name)
    onnx = pinned.steps[f"{name}-onnx"]
    _write_text(json.dumps(found, indent=2) + "\n", onnx / TUNED)
    for path in (
        onnx / configs.CONFIG,
        onnx.parent / configs.CONFIG,
        pinned.folder / ONE_PROCESS,
        repository / name / "configs" / ONE_PROCESS,
    ):
        _write_text(model_config.to_text(_tuned(model_config.read(path), onnx)), path)


def _tuned(written: Any, onnx: Path) -> Any:
    """The config with what was found for the ONNX step's version in this folder, if anything."""
    path = onnx / TUNED
    return (
        model_config.tuned(written, json.loads(path.read_text())["choice"]) if path.exists() else written
    )


def write_fusion(
    made: Fusion, facts: ModelSpec, record: Mapping[str, Any], repository: Path
) -> None:
    """Write the folder of a fusion, pinned to the versions of its two models that are served now.

    Raises:
        ModelNotFound: the repository has not both of them.
    """
    names = {"text": made.text_model, "image": made.image_model}
    models = {
        kind: Pin(name, int(configs.read(repository, name).folder.name))
        for kind, name in names.items()
    }
    version = number(facts.space, *(str(pin.version) for pin in models.values()))
    target = repository / facts.name / str(version)
    target.mkdir(parents=True, exist_ok=True)
    _write_text(facts.to_json(), target / spec.FILE_NAME)
    _write_text(json.dumps(record, indent=2) + "\n", target / "quality.json")
    fusion.save(made, target)
    precision, note = str(record["precision"]), str(record["fusion"])
    pin = Pin(facts.name, version)
    _keep(model_config.fusion(facts.name, facts, precision, models, note), pin, repository)
    remember({facts.name: version}, repository)
    switch({facts.name: version}, repository)
    prune({facts.name: version}, repository)


def pinned(repository: Path, step: str) -> set[int]:
    """Versions of a step that ensembles of the repository are made of, as far as they are there."""
    texts = [path.read_text() for path in repository.glob(f"*/{configs.CONFIG}")]
    versions = {configs.steps(config).get(step, 0) for config in texts}
    return versions & set(configs.stored_versions(repository / step))


def served(model: Path) -> set[int]:
    """Versions that a model's config names, as far as they are there."""
    path = model / configs.CONFIG
    named = configs.versions(path.read_text()) if path.exists() else []
    return set(named) & set(configs.stored_versions(model))


def forget(model: Path) -> None:
    """Drop the note of what an ensemble served before."""
    (model / PREVIOUS).unlink(missing_ok=True)


def prune(versions: Mapping[str, int], repository: Path) -> None:
    """Remove from the folders of these ensembles and their steps what is neither served, nor was
    before, nor is to follow.
    """
    kept: dict[str, set[int]] = {}
    for path in repository.glob(f"*/{configs.CONFIG}"):
        name = path.parent.name
        for version in served(path.parent) | {previous(path.parent) or 0}:
            for model, one in {name: version, **_pinned_by(path.parent / str(version))}.items():
                kept.setdefault(model.removesuffix(configs.CANDIDATE), set()).add(one)
    for model in {*versions, *(pin.model for pin in steps(versions, repository))}:
        for version in set(configs.stored_versions(repository / model)) - kept.get(model, set()):
            shutil.rmtree(repository / model / str(version), ignore_errors=True)


def _pinned_by(version: Path) -> dict[str, int]:
    path = version / configs.CONFIG
    return configs.steps(path.read_text()) if path.exists() else {}


def _unpublish_stale(built: Built, repository: Path) -> None:
    """Remove precisions that this build does not give and that were built for another space: one
    model's names are to be of one space.
    """
    for precision in SUFFIXES:
        ensemble = repository / served_name(built.name, precision)
        if precision in built.models or not (ensemble / configs.CONFIG).exists():
            continue
        if model_config.space(ensemble / configs.CONFIG) != built.spec.space:
            for folder in (ensemble, ensemble.with_name(f"{ensemble.name}-onnx")):
                (folder / configs.CONFIG).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def _place_tokenizer(built: Built, tokenizer: Path, pin: Pin, repository: Path) -> None:
    folder = repository / pin.model
    _copy(tokenizer, folder / str(pin.version) / text.FILE_NAME)
    _write_text(built.spec.to_json(), folder / str(pin.version) / spec.FILE_NAME)
    _seal(folder / str(pin.version) / name for name in (text.FILE_NAME, spec.FILE_NAME))
    _write_bytes(_bytes_tensor(WARMUP_TEXT), folder / "warmup" / "text")
    _write_bytes(_bytes_tensor(b"query"), folder / "warmup" / "input_type")
    _keep(model_config.tokenizer(pin.model, built.spec), pin, repository)


def _place_onnx(built: Built, precision: str, model: Path, pin: Pin, repository: Path) -> None:
    folder = repository / pin.model
    longest = model_config.WARM_TOKENS
    _copy_model(model, folder / str(pin.version))
    # Small ids that every vocabulary has; Triton reads as much as each sample's shape takes. The
    # same for every version: one may be loaded again.
    _write_bytes((np.arange(longest) % 100).astype("<i8").tobytes(), folder / "warmup/input_ids")
    _write_bytes(np.ones(longest, "<i8").tobytes(), folder / "warmup/attention_mask")
    written = model_config.onnx(pin.model, built.spec, precision, built.device)
    _keep(_tuned(written, folder / str(pin.version)), pin, repository)


def _place_pixels(built: Built, pin: Pin, repository: Path) -> None:
    folder = repository / pin.model
    _write_text(built.spec.to_json(), folder / str(pin.version) / spec.FILE_NAME)
    _write_bytes(_bytes_tensor(WARMUP_IMAGE), folder / "warmup" / "image")
    _keep(model_config.pixels(pin.model, built.spec), pin, repository)


def _place_vision(built: Built, precision: str, model: Path, pin: Pin, repository: Path) -> None:
    _copy_model(model, repository / pin.model / str(pin.version))
    _keep(model_config.vision(pin.model, built.spec, precision, built.device), pin, repository)


def _copy_model(model: Path, folder: Path) -> None:
    files = session.files(model)
    paths = [folder / file.name for file in files]
    if not all(map(_is_copied, files, paths)):
        parts = [_copied(file, path) for file, path in zip(files, paths, strict=True)]
        # Killed before the graph is there, a build leaves what does not open, never one graph with
        # another's weights.
        (folder / session.FILE_NAME).unlink(missing_ok=True)
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    _seal(paths)


def _seal(files: Iterable[Path]) -> None:
    """Note what these files of one version are, for the backend that opens them."""
    paths = list(files)
    _write_text(checksums.sha256sums(paths), paths[0].parent / checksums.FILE_NAME)


def _place_pooler(built: Built, pin: Pin, repository: Path) -> None:
    folder = repository / pin.model
    _write_text(built.spec.to_json(), folder / str(pin.version) / spec.FILE_NAME)
    _write_bytes(struct.pack("<i", built.spec.dims), folder / "warmup" / "dimensions")
    _keep(model_config.pooler(pin.model, built.spec), pin, repository)


def _place_ensemble(built: Built, precision: str, repository: Path) -> None:
    name = served_name(built.name, precision) + built.suffix
    version, steps, twin = built.version(precision), built.steps(precision), built.twin(precision)
    quality = built.quality[precision]
    folder = repository / name / str(version)
    _write_text(built.spec.to_json(), folder / spec.FILE_NAME)
    _write_text(json.dumps(quality, indent=2) + "\n", folder / "quality.json")
    described = (name, built.spec, precision, steps)
    missed = quality.get("missed", ())
    if built.tokenizer is None:
        _keep(model_config.image_ensemble(*described, missed, twin), Pin(name, version), repository)
        return
    _keep(model_config.ensemble(*described, missed, twin), Pin(name, version), repository)
    _write_text_warmup(built.spec, repository / name)
    onnx = repository / steps["onnx"].model / str(steps["onnx"].version)
    alone = _tuned(model_config.one_process(*described, built.device, missed, twin), onnx)
    _write_text(model_config.to_text(model_config.serving(alone, [version])), folder / ONE_PROCESS)


def _write_text_warmup(spec: ModelSpec, folder: Path) -> None:
    for length in model_config.warm_lengths(spec):
        words = b" ".join([b"a"] * (length - SPECIAL_TOKENS))
        _write_bytes(_bytes_tensor(words), folder / "warmup" / model_config.warm_text(length))
    _write_bytes(_bytes_tensor(b"query"), folder / "warmup" / "input_type")
    _write_bytes(struct.pack("<i", spec.dims), folder / "warmup" / "dimensions")


def _keep(written: Any, pin: Pin, repository: Path) -> None:
    """Write a config into the version folder that is served with it."""
    _write_config(written, [pin.version], repository / pin.model / str(pin.version))


def _serve(pin: Pin, versions: Iterable[int], repository: Path) -> None:
    """Write a step's config: this version's own, serving these versions."""
    folder = repository / pin.model
    _write_config(model_config.read(folder / str(pin.version) / configs.CONFIG), versions, folder)


def _write_config(written: Any, versions: Iterable[int], folder: Path) -> None:
    _write_text(model_config.to_text(model_config.serving(written, versions)), folder / configs.CONFIG)


def _bytes_tensor(value: bytes) -> bytes:
    """One BYTES element as Triton reads it from a file: 4-byte length, then the bytes."""
    return struct.pack("<I", len(value)) + value


def _write_text(content: str, path: Path) -> None:
    _write_bytes(content.encode(), path)


def _write_bytes(content: bytes, path: Path) -> None:
    _write_all({path: content})


def _write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files under other names first, so that all take their own in one moment."""
    written = []
    for path, content in contents.items():
        if not path.exists() or path.read_bytes() != content:
            part = _part(path)
            part.write_bytes(content)
            written.append((part, path))
    for part, path in written:
        part.replace(path)


def _copy(source: Path, path: Path) -> None:
    if not _is_copied(source, path):
        _copied(source, path).replace(path)


def _is_copied(source: Path, path: Path) -> bool:
    return path.exists() and (path.samefile(source) or filecmp.cmp(source, path, shallow=False))


def _copied(source: Path, path: Path) -> Path:
    """A copy beside the path, to be put in its place."""
    part = _part(path)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # another file system
        shutil.copyfile(source, part)
    return part


def _part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")
