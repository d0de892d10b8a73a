"""Build: one model's whole way from its name or folder to its folders in the repository.

Download → export → optimise → quantise → check → write. Every step is done once: a second
build does what is missing and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halimede.models import catalogue, store
from halimede_engine import session
from halimede_ops import spec, text
from halimede_ops.errors import InvalidInput, LicenceNotAccepted, QualityError
from halimede_ops.spec import ModelSpec
from halimede_repository import configs
from halimede_repository.checksums import sha256
from halimede_tools.build import candidates, check, describe, model_config, repository
from halimede_tools.build.check import BARS, TOOLS
from halimede_tools.build.describe import Reading
from halimede_tools.build.download import download
from halimede_tools.build.samples import corpus, pictures
from halimede_tools.build.steps import alone, console, fingerprint, key_of, once
from halimede_tools.settings import Settings

PRECISIONS = tuple(BARS)
IMAGE_STEP = "image-"
"""In front of a vision tower's steps' folders."""
CHECK_PICTURES = 132
"""Pictures that a vision tower is checked on: every form, thrice, in different sizes."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What to build, and what the user has accepted."""

    reading: Reading
    source: catalogue.Model | Path
    """A row of the catalogue, or the model's own folder."""
    precisions: tuple[str, ...] = PRECISIONS
    accepted: tuple[str, ...] = ()
    """Precisions that are published even when they miss their bar."""
    accepted_licence: str | None = None
    device: str = model_config.CPU
    calibration: Path | None = None
    """File with one text a line to take INT8's ranges from, instead of the built-in texts."""
    calibration_images: Path | None = None
    """Folder of pictures to take a vision tower's ranges from, instead of the drawn ones."""
    sts: Path | None = None
    """STS file to score every precision on."""

    @property
    def name(self) -> str:
        """Name the model is served under."""
        return self.reading.name


def order(model: str, name: str | None = None, **options: Any) -> Order:
    """The Order for a name of the catalogue or the path of a folder.

    `options` are the fields of Order and Reading.

    Raises:
        ModelNotFound: it is neither.
        InvalidInput: a precision or device is unknown, or a folder's name cannot be served.
    """
    reading = {key: options.pop(key) for key in Reading._fields if key in options}
    folder = Path(model)
    if folder.is_dir() or model.startswith((".", "/")):
        chosen = name or folder.resolve().name
        source: catalogue.Model | Path = folder.resolve()
    else:
        source = catalogue.find(model)
        chosen = name or source.name
        facts = ("prompts", "matryoshka", "layer_norm_before_cut")
        reading = {fact: getattr(source, fact) for fact in facts} | reading
    if not chosen.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise InvalidInput(f"name is {chosen!r}; use letters, digits, '-', '_' and '.'.")
    if chosen.endswith(configs.CANDIDATE):
        raise InvalidInput(f"name is {chosen!r}, as a candidate's; pass --candidate for one.")
    made = Order(Reading(chosen, **reading), source, **options)
    for given in (*made.precisions, *made.accepted):
        if given not in PRECISIONS:
            raise InvalidInput(f"precision is {given!r}; use {', '.join(PRECISIONS)}.")
    model_config.check_device(made.device)
    return made


def build(wanted: Order, settings: Settings, *, candidate: bool = False) -> list[str]:
    """Build what is wanted; the names of the ensembles it is served under, or of the candidates
    beside those.

    Raises:
        InvalidModel: the folder is not a model that is supported.
        BuildError: a step failed, or another build of the model runs; the repository is as it was.
        DeployError: it can be no candidate.
    """
    check_licence(wanted)
    write = candidates.write if candidate else repository.write
    with alone(wanted.name, settings) as folder:
        (folder / store.USED).touch()
        console.print(f"[bold]{wanted.name}[/]")
        built = make(wanted, folder, settings)
        ensembles = [name for one in built for name in write(one, settings.repository)]
        console.print(f"  [green]✓[/] write: {', '.join(ensembles)}")
    for evicted in store.prune(
        settings.models, settings.repository, settings.store_limit_bytes, keep=wanted.name
    ):
        console.print(f"  [dim]evicted {evicted.name}, {evicted.size_bytes / 1e6:.0f} MB[/]")
    return ensembles


def check_licence(wanted: Order) -> None:
    """Nothing, when the model's licence needs no consent, or has it.

    Raises:
        LicenceNotAccepted: the licence restricts use and was not accepted by name.
    """
    row = wanted.source
    if isinstance(row, Path) or not row.restricted or wanted.accepted_licence == row.licence:
        return
    raise LicenceNotAccepted(
        f"{row.name} is under {row.licence}: {row.restricted} Read it; "
        f"then pass --accept-licence {row.licence}."
    )


def make(wanted: Order, folder: Path, settings: Settings) -> list[repository.Built]:
    """What the steps give of the model's texts and of its images, done where they are missing;
    `folder` is the model's in the store.

    Raises:
        BuildError: a step failed.
    """
    source = _source(wanted, folder)
    describe.check_memory(source, wanted.name, settings.memory_limit_bytes)
    exported = _exported(wanted, source, folder / "fp32", check.TEXTS)
    facts = spec.load(exported)
    _say_where_folder_differs(wanted, facts)
    tokenizer = exported / text.FILE_NAME
    texts = _tower(wanted, source, exported, repository.Built(facts, tokenizer), check.TEXTS)
    if facts.image is None:
        return [texts]
    seen = _exported(wanted, source, folder / f"{IMAGE_STEP}fp32", check.IMAGES)
    images = _tower(wanted, source, seen, repository.Built(facts), check.IMAGES)
    return [
        dataclasses.replace(texts, twins=tuple(images.models)),
        dataclasses.replace(images, twins=tuple(texts.models)),
    ]


def _exported(wanted: Order, source: Path, folder: Path, tower: check.Tower) -> Path:
    return once(
        folder,
        key_of(
            _code("describe", "export", "graph/packing", "graph/rewrite"),
            fingerprint(source),
            json.dumps(wanted.reading),
            *_versions(),
        ),
        f"export to ONNX, optimise ({folder.name})",
        lambda target: _export(source, wanted.reading, tower, target),
    )


def _tower(
    wanted: Order, source: Path, exported: Path, built: repository.Built, tower: check.Tower
) -> repository.Built:
    """`built` with every precision of one tower that is wanted and reaches its bar."""
    facts = built.spec
    steps, options = {"fp32": exported}, {}
    if "fp16" in wanted.precisions:
        steps["fp16"] = _fp16(exported)
    if "int8" in wanted.precisions:
        calibration, names = _calibration(wanted, tower)
        options["int8"] = key_of(*names)
        steps["int8"] = _int8(exported, facts, tower, calibration, options["int8"])
    files = {precision: step / session.FILE_NAME for precision, step in steps.items()}
    checked = once(
        _beside(exported, "checked"),
        key_of(
            _code("check", "samples/corpus", "samples/pictures", "samples/sts"),
            facts.space,
            *(fingerprint(step) for step in steps.values()),
            sha256(wanted.sts) if wanted.sts else "",
            *_versions(),
        ),
        f"check {tower.inputs} against the model itself",
        lambda target: _check(source, wanted, files, facts, tower, target),
    )
    records = {name: json.loads((checked / f"{name}.json").read_text()) for name in files}
    published = _published(built.name, wanted, records)
    return dataclasses.replace(
        built,
        models={name: files[name] for name in published},
        quality={name: records[name] for name in published},
        device=wanted.device,
        options=options,
    )


def _fp16(exported: Path) -> Path:
    folder = _beside(exported, "fp16")
    return once(
        folder,
        key_of(_code("quantise", "graph/rewrite"), fingerprint(exported), *_versions()),
        f"quantise ({folder.name})",
        lambda target: _to_fp16(exported, target),
    )


def _int8(
    exported: Path,
    facts: ModelSpec,
    tower: check.Tower,
    calibration: list[Any],
    options: str,
) -> Path:
    folder = _beside(exported, "int8")
    return once(
        folder,
        key_of(
            _code(
                "quantise",
                "graph/outliers",
                "graph/packing",
                "graph/rewrite",
                "samples/corpus",
                "samples/pictures",
            ),
            fingerprint(exported),
            options,
            *_versions(),
        ),
        f"quantise ({folder.name})",
        lambda target: _to_int8(exported, facts, tower, calibration, target),
    )


def _calibration(wanted: Order, tower: check.Tower) -> tuple[list[Any], list[str]]:
    """What INT8's ranges are taken from, and what tells each from any other."""
    if tower is check.TEXTS:
        texts = corpus.calibration(wanted.calibration)
        return texts, texts
    files = pictures.calibration(wanted.calibration_images)
    return files, [hashlib.sha256(file).hexdigest() for file in files]


def _beside(exported: Path, step: str) -> Path:
    """The folder of another step of the same tower."""
    return exported.with_name(exported.name.removesuffix("fp32") + step)


def _versions() -> list[str]:
    return [f"{tool}={importlib.metadata.version(tool)}" for tool in TOOLS]


def _source(wanted: Order, folder: Path) -> Path:
    row = wanted.source
    if isinstance(row, Path):
        describe.check_modules(row, wanted.name)
        return row
    return once(
        folder / "source",
        key_of("download", row.weights_sha256 or json.dumps(row.sources)),
        "download",
        lambda target: download(row, target),
    )


def _published(name: str, wanted: Order, records: Mapping[str, dict[str, Any]]) -> list[str]:
    """The wanted precisions that reach their bar or are accepted below it.

    Raises:
        QualityError: FP32 misses its bar, or nothing is left to publish.
    """
    published = []
    for precision in wanted.precisions:
        missed = "; ".join(records[precision]["missed"])
        if not missed or precision in wanted.accepted:
            published.append(precision)
            continue
        line = (
            f"{name} in {precision} is not published: {missed}. "
            f"Publish it all the same with --accept {precision}."
        )
        if precision == "fp32":
            raise QualityError(line)
        console.print(f"  [yellow]! {line}[/]")
    if not published:
        raise QualityError(f"no precision of {name} reaches its bar.")
    return published


def _say_where_folder_differs(wanted: Order, facts: ModelSpec) -> None:
    """The catalogue is for finding models; where the folder says otherwise, the folder holds."""
    row = wanted.source
    if isinstance(row, Path):
        return
    for name, listed, found in (
        ("dims", row.dims, facts.dims),
        ("max_tokens", row.max_tokens, facts.max_tokens),
    ):
        if listed != found:
            console.print(f"  [yellow]! {name}: the catalogue has {listed}, the folder {found}[/]")


def _code(*modules: str) -> str:
    """A key of the tools' own code: a step is done again when it changes."""
    return key_of(*(sha256(Path(__file__).parent / f"{module}.py") for module in modules))


# The heavy imports (torch, nncf) wait until a step really runs: a second build takes seconds.


def _export(source: Path, reading: Reading, tower: check.Tower, target: Path) -> None:
    from halimede_tools.build.export import export, export_images

    write = export if tower is check.TEXTS else export_images
    write(source, reading, target)


def _to_fp16(exported: Path, target: Path) -> None:
    from halimede_tools.build.quantise import to_fp16

    to_fp16(exported / session.FILE_NAME, target / session.FILE_NAME)


def _to_int8(
    exported: Path,
    facts: ModelSpec,
    tower: check.Tower,
    calibration: list[Any],
    target: Path,
) -> None:
    from halimede_tools.build.quantise import to_int8

    fp32, int8 = exported / session.FILE_NAME, target / session.FILE_NAME
    inputs = _check_inputs(tower)[::3]
    done = to_int8(fp32, tower, facts, calibration, inputs, int8)
    (target / "quantised.json").write_text(json.dumps(done, indent=2))


def _check(
    source: Path,
    wanted: Order,
    files: Mapping[str, Path],
    facts: ModelSpec,
    tower: check.Tower,
    target: Path,
) -> None:
    from halimede_tools.build.samples.sts import spearman

    inputs = _check_inputs(tower)
    expected = tower.reference(source, inputs, wanted.reading)
    for precision, path in files.items():
        engine = check.Engine(path, tower.rows(files["fp32"].parent, facts), facts)
        record = check.check(precision, path, files["fp32"], engine, tower, inputs, expected)
        if precision == "int8":
            record |= json.loads((path.parent / "quantised.json").read_text())
        if wanted.sts is not None and tower is check.TEXTS:
            record["sts_spearman"] = round(spearman(wanted.sts, engine.embed), 3)
        console.print(f"    {_summary(record)}")
        (target / f"{precision}.json").write_text(json.dumps(record, indent=2))


def _check_inputs(tower: check.Tower) -> list[Any]:
    return corpus.check_texts() if tower is check.TEXTS else pictures.check_pictures(CHECK_PICTURES)


def _summary(record: dict[str, Any]) -> str:
    return (
        f"{record['precision']}: mean cosine {record['mean_cosine']:.6f}, lowest "
        f"{record['min_cosine']:.4f}, invariance {record['invariance']:.6f}, "
        f"{record['size_bytes'] / 1e6:.1f} MB ({record['size_ratio']:.2f})"
    )
