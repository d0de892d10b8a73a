"""Write: a built model to its folders in the Triton model repository.

A version folder is numbered by what it was built from. An ensemble pins the version of each step,
and each config names the versions that it serves, so the version of an answer tells the content
that made it. A version folder keeps the config that it is served with, so any version on disk can
be served again.

A new version is placed beside the old one. Three moves follow: the steps serve both versions, the
ensembles switch to the new one, the steps release the old one. Files are written under another name
and renamed: a killed build leaves each ensemble in the old or the new version, never in between.
Files that are already equal are not touched.
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

from halimede_engine import session
from halimede_ops import fusion, spec, text
from halimede_ops.errors import InvalidModel
from halimede_ops.fusion import Fusion
from halimede_ops.spec import ImageSpec, LateSpec, ModelSpec
from halimede_repository import checksums, configs
from halimede_tools.build import model_config, towers
from halimede_tools.build.model_config import Pin
from halimede_tools.build.samples import pictures

RECIPE = 6
"""Raise this when the build makes another graph, or other vectors, from the same weights, precision
and options."""
RECIPE_GRAPHS = {
    "fp32": "ddc28421df88c408",
    "fp16": "5e4983348be0bd57",
    "int8": "5e2c38192dfc6a8d",
}
"""Digests of RECIPE with the structure of the default model's graphs: tests/tools/test_versions.py
fails where a build makes others. Raise RECIPE, then note the digests that the test gives."""
SUFFIXES = {"fp32": "", "fp16": "-fp16", "int8": "-int8"}
ONE_PROCESS = f"{configs.ONE_PROCESS}.pbtxt"
"""File of an ensemble's second config, in `configs/` and in its version folders."""
FIRST_NUMBER = 10**11
"""Versions have twelve digits: more than any counter, exact in JSON, short enough to read."""
ALIAS_VERSION = 1
"""The version of every alias: an alias has no content of its own."""
WARMUP_TEXT = b"The first request of a server should be as fast as the second."
SPECIAL_TOKENS = 2
"""Tokens that most tokenizers add to a text; warm-up texts have that many words less."""
WARMUP_IMAGE = pictures.encoded(Image.new("RGB", (1, 1)), pictures.Form("BMP", "RGB"))
PREVIOUS = "previous"
"""File in an ensemble's folder: the version that was served before, to go back to."""
TUNED = "tuned.json"
"""File in a version folder of an ONNX step: the result of `tune` for this machine."""
IMAGE_SUFFIX = "-image"
"""Suffix of a model's image ensembles, before the precision's suffix."""


@dataclasses.dataclass(frozen=True)
class Built:
    """One tower of a built model: its texts, or its images."""

    spec: ModelSpec
    tokenizer: Path | None = None
    """`tokenizer.json`; None for images."""
    models: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Precision → model.onnx."""
    quality: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Precision → quality record."""
    device: str = model_config.CPU
    """Device that the ONNX step's config asks for."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Precision → digest of what its vectors depend on besides spec, precision and RECIPE."""
    counterparts: tuple[str, ...] = ()
    """Precisions of the model's other tower: of its images for texts, and the reverse."""
    suffix: str = ""
    """Appended to the name of each of its folders: `configs.CANDIDATE` for a candidate."""

    @property
    def name(self) -> str:
        """Name of the FP32 ensemble, without `suffix`."""
        has_suffix = self.tokenizer is None and self.spec.takes_texts
        return self.spec.name + (IMAGE_SUFFIX if has_suffix else "")

    @property
    def names(self) -> list[str]:
        """Names of its ensembles."""
        return [self.ensemble(precision).model for precision in self.models]

    @property
    def versions(self) -> dict[str, int]:
        """Ensemble → its version."""
        return dict(self.ensemble(precision) for precision in self.models)

    def counterpart(self, precision: str) -> str:
        """Name of the ensemble of the model's other tower; empty where there is none."""
        if not self.counterparts:
            return ""
        name = self.spec.name + (IMAGE_SUFFIX if self.tokenizer else "")
        other = precision if precision in self.counterparts else self.counterparts[0]
        return served_name(name, other) + self.suffix

    def computed(self, precision: str) -> model_config.Computed:
        """How the build measured a precision, on a CPU."""
        record = self.quality[precision]
        return model_config.Computed(
            str(record.get("arithmetic", "")), str(record.get("engine", towers.OPENVINO))
        )

    def ensemble(self, precision: str) -> Pin:
        """The ensemble of a precision, with its version."""
        return Pin(served_name(self.name, precision) + self.suffix, self.version(precision))

    def version(self, precision: str) -> int:
        """Version of an ensemble. It differs if the version of a step does."""
        return number(*(str(pin.version) for pin in self.steps(precision).values()))

    def steps(self, precision: str) -> dict[str, Pin]:
        """The steps of an ensemble, each with its version."""
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
    """The version number of what is built from these facts: positive, twelve digits.

    Facts are the inputs of a build, not the bytes of its result: an INT8 file differs between CPUs,
    and a graph between releases of PyTorch, although space and precision are the same.
    """
    digest = hashlib.sha256("\0".join((str(RECIPE), *facts)).encode()).digest()
    return FIRST_NUMBER + int.from_bytes(digest, "big") % (9 * FIRST_NUMBER)


def _facts(spec: ModelSpec) -> str:
    """The fields of a spec that differ from their default, so a new field does not change the
    version of models that do not use it.
    """
    plain = ModelSpec("", "", 0, 0, normalised=False, prompts={})
    fields = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != getattr(plain, field.name)
    }
    return json.dumps(fields, sort_keys=True, default=_inner_facts)


def _inner_facts(facts: ImageSpec | LateSpec) -> dict[str, Any]:
    """All fields of a late-interaction model; of images the limits, and the fields that decide
    vectors.
    """
    if isinstance(facts, LateSpec):
        return dataclasses.asdict(facts)
    limits = {name: getattr(facts, name) for name in spec.IMAGE_LIMITS}
    return limits | facts.decides()


def served_name(model: str, precision: str) -> str:
    """Name that a precision is served under: FP32 has no suffix."""
    return model + SUFFIXES[precision]


def write(built: Built, repository: Path) -> list[str]:
    """Write all folders of a built tower; the names of its ensembles.

    The versions served before stay on disk for a server that still runs them. Older ones are
    removed.
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
    """Names of all folders of a built tower: its steps, then its ensembles."""
    steps = {pin.model: None for one in built.models for pin in built.steps(one).values()}
    return [*steps, *built.names]


def place(built: Built, repository: Path) -> None:
    """Write the version folders, each with the config that it is served with. What is served does
    not change.
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
    """First move: let the steps serve these versions of ensembles, besides the pinned ones."""
    for pin in steps(versions, repository):
        _serve(pin, {pin.version} | pinned(repository, pin.model), repository)


def switch(versions: Mapping[str, int], repository: Path, share: float | None = None) -> None:
    """Second move: serve these versions of ensembles. A candidate gets `share` of its model's
    requests.

    All files are renamed at the end, one right after the other. A process killed between two
    renames leaves each ensemble whole, but some in the old version and some in the new one.
    """
    changed = {}
    for name, version in with_maxsim(versions, repository).items():
        folder = repository / name
        for kept, path in (
            (configs.CONFIG, folder / configs.CONFIG),
            (ONE_PROCESS, folder / "configs" / ONE_PROCESS),
        ):
            if (folder / str(version) / kept).exists():
                written = model_config.read(folder / str(version) / kept)
                shared = written if share is None else model_config.with_share(written, share)
                changed[path] = model_config.to_text(shared).encode()
    _write_all(changed)


def release(versions: Mapping[str, int], repository: Path) -> None:
    """Third move: let the steps of these versions serve only what ensembles pin."""
    for pin in steps(versions, repository):
        _serve(pin, pinned(repository, pin.model), repository)


def steps(versions: Mapping[str, int], repository: Path) -> list[Pin]:
    """The steps of these versions of ensembles, each once.

    Raises:
        InvalidModel: a version's folder has no config.
    """
    pins: dict[Pin, None] = {}
    for name, version in versions.items():
        try:
            written = (repository / name / str(version) / configs.CONFIG).read_text()
        except OSError:
            raise InvalidModel(
                f"version {version} of {name} is not on disk as it was served. Build it again."
            ) from None
        pins |= {Pin(*pin): None for pin in configs.steps(written).items()}
    return list(pins)


def remember(versions: Mapping[str, int], repository: Path) -> None:
    """Note the version that each ensemble serves now, before it switches to another."""
    for name, version in versions.items():
        for before in served(repository / name) - {version}:
            _write_text(f"{before}\n", repository / name / PREVIOUS)


def previous(model: Path) -> int | None:
    """The version that an ensemble served before; None if it is not on disk."""
    try:
        version = int((model / PREVIOUS).read_text())
    except (OSError, ValueError):
        return None
    return version if version in configs.stored_versions(model) else None


def tune(name: str, found: Mapping[str, Any], repository: Path) -> None:
    """Write the `choice` of a tuning result into the configs of an ensemble's current version. A
    build that gives the same version keeps it.

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


def _tuned(written: Any, onnx: Path, computed: model_config.Computed = model_config.IN_F32) -> Any:
    """The config with the tuning result of the ONNX step's version folder, if it has one. A result
    from before the build found that OpenVINO cannot run the model puts it into no config.
    """
    path = onnx / TUNED
    if not path.exists():
        return written
    choice = json.loads(path.read_text())["choice"]
    if not towers.ACCELERATORS[computed.engine]:
        choice |= {"provider": ""}
    return model_config.tuned(written, choice)


def write_fusion(
    projection: Fusion, facts: ModelSpec, record: Mapping[str, Any], repository: Path
) -> None:
    """Write the folder of a fusion, pinned to the served versions of its two models.

    Raises:
        ModelNotFound: the repository lacks one of them.
    """
    names = {"text": projection.text_model, "image": projection.image_model}
    models = {
        kind: Pin(name, int(configs.read(repository, name).folder.name))
        for kind, name in names.items()
    }
    version = number(facts.space, *(str(pin.version) for pin in models.values()))
    target = repository / facts.name / str(version)
    target.mkdir(parents=True, exist_ok=True)
    _write_text(facts.to_json(), target / spec.FILE_NAME)
    _write_text(json.dumps(record, indent=2) + "\n", target / "quality.json")
    fusion.save(projection, target)
    precision, note = str(record["precision"]), str(record["fusion"])
    pin = Pin(facts.name, version)
    _keep(model_config.fusion(facts.name, facts, precision, models, note), pin, repository)
    remember({facts.name: version}, repository)
    switch({facts.name: version}, repository)
    prune({facts.name: version}, repository)


def write_router(facts: ModelSpec, towers: Mapping[str, Built], repository: Path) -> list[str]:
    """Write all folders of a router's towers, and a router for each precision that all of them
    have; the names of the routers.

    Nothing that is served changes before all are written.
    """
    both = list(towers.values())
    precisions = [precision for precision in SUFFIXES if all(precision in b.models for b in both)]
    routers = {}
    for precision in precisions:
        pins = {tower: built.ensemble(precision) for tower, built in towers.items()}
        versions = [str(pin.version) for pin in pins.values()]
        pin = Pin(served_name(facts.name, precision), number(_facts(facts), *versions))
        records = {tower: built.quality[precision] for tower, built in towers.items()}
        missed = [f"{t}: {what}" for t, record in records.items() for what in record["missed"]]
        record = {
            "model": facts.name,
            "space": facts.space,
            "precision": precision,
            "mean_cosine": min(record["mean_cosine"] for record in records.values()),
            "missed": missed,
            "towers": records,
        }
        target = repository / pin.model / str(pin.version)
        _write_text(facts.to_json(), target / spec.FILE_NAME)
        _write_text(json.dumps(record, indent=2) + "\n", target / "quality.json")
        _keep(model_config.router(pin.model, facts, precision, pins, missed), pin, repository)
        routers[pin.model] = pin.version
    for built in both:
        place(built, repository)
    ensembles = routers | {name: version for b in both for name, version in b.versions.items()}
    # No note of a router's version before: it pins versions of its towers that are not served.
    for built in both:
        remember(built.versions, repository)
    add(ensembles, repository)
    switch(ensembles, repository)
    _remove_routers(facts, routers, repository)
    for built in both:
        _unpublish_stale(built, repository)
    release(ensembles, repository)
    prune(ensembles, repository)
    return list(routers)


def write_aliases(names: Iterable[str], repository: Path) -> list[str]:
    """Write the aliases of ensembles; their names. They follow the version that is served."""
    written = []
    for name in names:
        for suffix, text_input in configs.ALIASES.items():
            pin = Pin(name + suffix, ALIAS_VERSION)
            _keep(model_config.alias(pin.model, name, text_input), pin, repository)
            _serve(pin, [pin.version], repository)
            written.append(pin.model)
    return written


def _remove_routers(facts: ModelSpec, kept: Mapping[str, int], repository: Path) -> None:
    """Remove routers of precisions that this build does not contain, if their space is another."""
    for precision in SUFFIXES:
        folder = repository / served_name(facts.name, precision)
        config = folder / configs.CONFIG
        is_left_out = folder.name not in kept and config.exists()
        if is_left_out and model_config.space(config) != facts.space:
            _remove([folder.with_name(folder.name + suffix) for suffix in ("", *configs.ALIASES)])


def pinned(repository: Path, step: str) -> set[int]:
    """Versions of a step that ensembles of the repository pin and that are on disk."""
    texts = [path.read_text() for path in repository.glob(f"*/{configs.CONFIG}")]
    versions = {configs.steps(config).get(step, 0) for config in texts}
    return versions & set(configs.stored_versions(repository / step))


def served(model: Path) -> set[int]:
    """Versions that a model's config names and that are on disk."""
    path = model / configs.CONFIG
    named = configs.versions(path.read_text()) if path.exists() else []
    return set(named) & set(configs.stored_versions(model))


def forget(model: Path) -> None:
    """Drop the note of the version that an ensemble served before."""
    (model / PREVIOUS).unlink(missing_ok=True)


def prune(versions: Mapping[str, int], repository: Path) -> None:
    """Remove old versions of these ensembles and of their steps: all but the served one, the one
    before, and a candidate's.
    """
    kept: dict[str, set[int]] = {}
    for path in repository.glob(f"*/{configs.CONFIG}"):
        name = path.parent.name
        for version in served(path.parent) | {previous(path.parent) or 0}:
            pins = {name: version, **_pinned_by(path.parent / str(version))}
            for model, number in pins.items():
                kept.setdefault(model.removesuffix(configs.CANDIDATE), set()).add(number)
    scoring = {f"{name}{configs.MAXSIM}" for name in versions}
    for name in scoring:  # has the versions of its ensemble
        kept[name] = kept.get(name.removesuffix(configs.MAXSIM), set())
    for model in {*versions, *scoring, *(pin.model for pin in steps(versions, repository))}:
        for version in set(configs.stored_versions(repository / model)) - kept.get(model, set()):
            shutil.rmtree(repository / model / str(version), ignore_errors=True)


def replaces(built: Iterable[Built], repository: Path) -> bool:
    """Whether the repository serves another version of any precision of these."""
    return any(
        served(repository / served_name(one.name, precision)) - {one.version(precision)}
        for one in built
        for precision in SUFFIXES
    )


def _pinned_by(version: Path) -> dict[str, int]:
    path = version / configs.CONFIG
    return configs.steps(path.read_text()) if path.exists() else {}


def _unpublish_stale(built: Built, repository: Path) -> None:
    """Remove precisions of another space that this build does not contain: all names of a model
    have one space.
    """
    for precision in SUFFIXES:
        ensemble = repository / served_name(built.name, precision)
        if precision in built.models or not (ensemble / configs.CONFIG).exists():
            continue
        if model_config.space(ensemble / configs.CONFIG) != built.spec.space:
            suffixes = ("", "-onnx", configs.MAXSIM, *configs.ALIASES)
            _remove([ensemble.with_name(ensemble.name + suffix) for suffix in suffixes])


def _remove(models: Iterable[Path]) -> None:
    """Remove folders of models, so that none is served in part."""
    for folder in models:
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
    # Small ids that every vocabulary has; Triton reads as many as a sample's shape needs. All
    # versions share them, as an old one may be loaded again.
    _write_bytes((np.arange(longest) % 100).astype("<i8").tobytes(), folder / "warmup/input_ids")
    _write_bytes(np.ones(longest, "<i8").tobytes(), folder / "warmup/attention_mask")
    written = model_config.onnx(
        pin.model, built.spec, precision, built.device, built.computed(precision)
    )
    _keep(_tuned(written, folder / str(pin.version), built.computed(precision)), pin, repository)


def _place_pixels(built: Built, pin: Pin, repository: Path) -> None:
    folder = repository / pin.model
    _write_text(built.spec.to_json(), folder / str(pin.version) / spec.FILE_NAME)
    _write_bytes(_bytes_tensor(WARMUP_IMAGE), folder / "warmup" / "image")
    _keep(model_config.pixels(pin.model, built.spec), pin, repository)


def _place_vision(built: Built, precision: str, model: Path, pin: Pin, repository: Path) -> None:
    _copy_model(model, repository / pin.model / str(pin.version))
    written = model_config.vision(
        pin.model, built.spec, precision, built.device, built.computed(precision)
    )
    _keep(written, pin, repository)


def _copy_model(model: Path, folder: Path) -> None:
    files = session.files(model)
    paths = [folder / file.name for file in files]
    if not all(map(_is_copied, files, paths)):
        parts = [_copied(file, path) for file, path in zip(files, paths, strict=True)]
        # A build killed here leaves a version that does not open, never a graph with the weights
        # of another.
        (folder / session.FILE_NAME).unlink(missing_ok=True)
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    _seal(paths)


def _seal(files: Iterable[Path]) -> None:
    """Write the checksums of files of one version folder, which the backend verifies."""
    paths = list(files)
    _write_text(checksums.sha256sums(paths), paths[0].parent / checksums.FILE_NAME)


def _place_pooler(built: Built, pin: Pin, repository: Path) -> None:
    folder = repository / pin.model
    _write_text(built.spec.to_json(), folder / str(pin.version) / spec.FILE_NAME)
    _write_bytes(struct.pack("<i", built.spec.dims), folder / "warmup" / "dimensions")
    _keep(model_config.pooler(pin.model, built.spec), pin, repository)


def _place_ensemble(built: Built, precision: str, repository: Path) -> None:
    pin, steps = built.ensemble(precision), built.steps(precision)
    quality = built.quality[precision]
    folder = repository / pin.model / str(pin.version)
    _write_text(built.spec.to_json(), folder / spec.FILE_NAME)
    _write_text(json.dumps(quality, indent=2) + "\n", folder / "quality.json")
    described = model_config.Ensemble(
        pin.model,
        built.spec,
        precision,
        steps,
        quality.get("missed", ()),
        built.counterpart(precision),
        built.computed(precision),
    )
    if built.tokenizer is None:
        _keep(model_config.image_ensemble(described), pin, repository)
        return
    _keep(model_config.ensemble(described), pin, repository)
    if spec.MULTI_VECTOR in built.spec.heads and not built.suffix:
        _place_maxsim(described, pin.version, quality, repository)
    _write_text_warmup(built.spec, repository / pin.model)
    onnx = repository / steps["onnx"].model / str(steps["onnx"].version)
    one_process = _tuned(
        model_config.one_process(described, built.device), onnx, described.computed
    )
    _write_text(
        model_config.to_text(model_config.serving(one_process, [pin.version])),
        folder / ONE_PROCESS,
    )


def _place_maxsim(
    described: model_config.Ensemble, version: int, quality: Mapping[str, Any], repository: Path
) -> None:
    """Write the version folder of the model that scores pairs by an ensemble's multi-vectors."""
    pin = Pin(described.name + configs.MAXSIM, version)
    folder = repository / pin.model / str(version)
    facts = model_config.scored(described.spec)
    _write_text(facts.to_json(), folder / spec.FILE_NAME)
    record = {**quality, "space": facts.space}
    _write_text(json.dumps(record, indent=2) + "\n", folder / "quality.json")
    _keep(model_config.maxsim(pin.model, described, version), pin, repository)


def with_maxsim(versions: Mapping[str, int], repository: Path) -> dict[str, int]:
    """These versions of ensembles, and of the models that score pairs by them. Such a model has the
    version of its ensemble.
    """
    scoring = {f"{name}{configs.MAXSIM}": version for name, version in versions.items()}
    placed = {
        name: version
        for name, version in scoring.items()
        if (repository / name / str(version) / configs.CONFIG).exists()
    }
    return {**versions, **placed}


def _write_text_warmup(spec: ModelSpec, folder: Path) -> None:
    for length in model_config.warm_lengths(spec):
        words = b" ".join([b"a"] * (length - SPECIAL_TOKENS))
        _write_bytes(_bytes_tensor(words), folder / "warmup" / model_config.warm_text(length))
    if spec.takes_pairs:
        _write_bytes(_bytes_tensor(WARMUP_TEXT), folder / "warmup" / "text")
    _write_bytes(_bytes_tensor(b"query"), folder / "warmup" / "input_type")
    _write_bytes(struct.pack("<i", spec.dims), folder / "warmup" / "dimensions")


def _keep(written: Any, pin: Pin, repository: Path) -> None:
    """Write the config of a version into its folder."""
    _write_config(written, [pin.version], repository / pin.model / str(pin.version))


def _serve(pin: Pin, versions: Iterable[int], repository: Path) -> None:
    """Write a step's config: that of its pinned version, serving these versions."""
    folder = repository / pin.model
    _write_config(model_config.read(folder / str(pin.version) / configs.CONFIG), versions, folder)


def _write_config(written: Any, versions: Iterable[int], folder: Path) -> None:
    _write_text(
        model_config.to_text(model_config.serving(written, versions)), folder / configs.CONFIG
    )


def _bytes_tensor(value: bytes) -> bytes:
    """One BYTES element as Triton reads it from a file: 4-byte length, then the bytes."""
    return struct.pack("<I", len(value)) + value


def _write_text(content: str, path: Path) -> None:
    _write_bytes(content.encode(), path)


def _write_bytes(content: bytes, path: Path) -> None:
    _write_all({path: content})


def _write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files under other names, then rename all of them at once."""
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
    """A copy or hard link beside the path, to be renamed to it."""
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
