"""Build: one model's whole way from its name or folder to its folders in the repository.

Download → export → optimise → quantise → check → write. Every step runs once: a second build runs
what is missing and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from halimede.config.folders import REPOSITORY, writing
from halimede.models import catalogue, store
from halimede_engine import session
from halimede_ops import spec, text
from halimede_ops.errors import (
    BuildError,
    DeployError,
    InvalidInput,
    InvalidModel,
    LicenceNotAccepted,
    QualityError,
)
from halimede_ops.spec import CLASSIFIER, LATE_INTERACTION, RERANKER, SPARSE_KIND, ModelSpec
from halimede_repository import configs, names
from halimede_tools.build import (
    candidates,
    check,
    describe,
    export,
    fp16,
    int8,
    model_config,
    repository,
    towers,
)
from halimede_tools.build.checks import arguments, spans
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.download import HUB_FILES, download
from halimede_tools.build.keys import key_of
from halimede_tools.build.kinds import routes
from halimede_tools.build.kinds.recognise import PREPROCESSING, takes_images_alone
from halimede_tools.build.repository import Built
from halimede_tools.build.samples import corpus, pictures
from halimede_tools.build.steps import cached_step, exclusive, run_step
from halimede_tools.build.vision import two_towers
from halimede_tools.console import console
from halimede_tools.settings import Settings

PRECISIONS = tuple(repository.SUFFIXES)
IMAGE_STEP = "image-"
"""In front of a vision tower's steps' folders."""
BY_KIND = {
    RERANKER: towers.PAIRS,
    CLASSIFIER: towers.LABELLED,
    SPARSE_KIND: towers.WEIGHTED,
    LATE_INTERACTION: towers.LATE,
}
"""The tower that texts enter, by the kind of model; TEXTS for others."""
SHARE_FOR_LONG_TEXTS = 2
"""The attention scores of the longest text that is checked take at most one part in this many of
the memory limit."""
Published = Callable[[list[str]], None]
"""Hears the names of the ensembles that have just been written."""


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What to build, and what the user has accepted."""

    options: ModelOptions
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
    alias: bool = False
    """Write aliases for other programs that ask Triton itself."""

    @property
    def name(self) -> str:
        """Name the model is served under."""
        return self.options.name


class Fields(TypedDict, total=False):
    """Fields of a BuildRequest and of its ModelOptions; their defaults are there."""

    precisions: tuple[str, ...]
    accepted: tuple[str, ...]
    accepted_licence: str | None
    device: str
    calibration: Path | None
    calibration_images: Path | None
    sts: Path | None
    alias: bool
    trust_remote_code: bool
    max_tokens: int | None
    prompts: Mapping[str, str]
    matryoshka: tuple[int, ...]
    layer_norm_before_cut: bool
    token_embeddings: bool
    late_chunking: bool
    kind: str | None


@dataclasses.dataclass(frozen=True)
class TowerProgress:
    """One tower of a model, and what of it is built so far."""

    tower: towers.Tower
    exported: Path
    """The folder of its FP32 step."""
    expected: Path
    """The folder of the vectors that every precision is compared to."""
    long: Path | None
    """The folder of the same for long texts; None for a tower of images."""
    calibration: list[Any]
    """Inputs to take INT8's ranges from."""
    built: Built


def build_request(model: str, name: str | None = None, **fields: Unpack[Fields]) -> BuildRequest:
    """The BuildRequest for a name of the catalogue or the path of a folder.

    Raises:
        ModelNotFound: it is neither.
        InvalidInput: a precision or device is unknown, or the name cannot be served.
    """
    others: dict[str, Any] = {**fields}
    options = {key: others.pop(key) for key in ModelOptions._fields if key in others}
    folder = Path(model)
    if folder.is_dir() or model.startswith((".", "/")):
        chosen = name or folder.resolve().name
        source: catalogue.Model | Path = folder.resolve()
    else:
        source = catalogue.find(model)
        chosen = name or source.name
        facts = ("prompts", "matryoshka", "layer_norm_before_cut")
        options = {fact: getattr(source, fact) for fact in facts} | options
        if options.get("kind") is None and source.kind != spec.DENSE:
            options["kind"] = source.kind
    names.check_servable(chosen)
    if chosen.endswith(configs.CANDIDATE):
        raise InvalidInput(f"name is {chosen!r}, as a candidate's; pass --candidate for one.")
    request = BuildRequest(ModelOptions(chosen, **options), source, **others)
    if not request.precisions:
        raise InvalidInput(f"precisions is empty; use {', '.join(PRECISIONS)}.")
    for precision in (*request.precisions, *request.accepted):
        if precision not in PRECISIONS:
            raise InvalidInput(f"precision is {precision!r}; use {', '.join(PRECISIONS)}.")
    model_config.check_device(request.device)
    return request


def build(
    request: BuildRequest,
    settings: Settings,
    *,
    candidate: bool = False,
    published: Published | None = None,
) -> list[str]:
    """Build what is requested; the names of the ensembles it is served under, or of the candidates
    beside those.

    With `published`, a model that is new to the repository is written one precision at a time, in
    the order of the request, and `published` is called after each. A model that replaces another
    version is written once, whole, so that its names never differ in space; so is a candidate.

    Raises:
        InvalidInput: a file of the request cannot be read, or the name collides with another
            model's.
        InvalidModel: the folder is not a model that is supported.
        BuildError: a step failed, or another build of the model runs; the repository keeps what
            was written before that.
        DeployError: it can be no candidate.
    """
    check_request(request, settings, candidate)
    if _has_router(request):
        return _build_router(request, settings, candidate, published)
    write = candidates.write if candidate else repository.write
    written: list[str] = []

    def publish(built: list[Built]) -> None:
        ensembles = _write(request, built, write, settings.repository)
        new = [name for name in ensembles if name not in written]
        written[:] = ensembles
        console.print(f"  [green]✓[/] write: {', '.join(new)}")
        if published is not None:
            published(new)

    with exclusive(request.name, settings) as folder:
        (folder / store.USED).touch()
        console.print(f"[bold]{request.name}[/]")
        for built in stages(request, folder, settings):
            early = published is not None and not candidate and all(one.models for one in built)
            if early and not repository.replaces(built, settings.repository):
                publish(built)
        if candidate:
            built = _of_candidate(request, built, settings.repository)
        if written != [name for tower in built for name in tower.names]:
            publish(built)
    _evict(request.name, settings)
    return written


def _write(
    request: BuildRequest, built: list[Built], write: Callable[..., list[str]], repository: Path
) -> list[str]:
    """Write what was built, and its aliases. Return the names of the ensembles."""
    _check_aliases(request, built)
    with writing(repository, REPOSITORY, BuildError):
        ensembles = [name for tower in built for name in write(tower, repository)]
        _write_aliases(request, [one for one in built if one.tokenizer], repository)
    return ensembles


def _check_aliases(request: BuildRequest, built: list[Built]) -> None:
    """Raise if aliases are requested of a model without text embeddings.

    Raises:
        InvalidInput: they are.
    """
    if request.alias and not any(one.tokenizer and one.spec.kind == spec.DENSE for one in built):
        raise InvalidInput(
            f"{request.name} gives no embeddings of texts, which LiteLLM and LlamaIndex ask for. "
            "Leave out --alias."
        )


def _write_aliases(request: BuildRequest, towers: list[Built], folder: Path) -> None:
    if request.alias:
        repository.write_aliases((name for tower in towers for name in tower.names), folder)


def _has_router(request: BuildRequest) -> bool:
    """Whether the folder's texts have a tower for queries and one for documents.

    Raises:
        InvalidModel: it has a Router that is not supported.
    """
    source = request.source
    if not isinstance(source, Path) or not routes.is_router(source):
        return False
    chosen = routes.towers(routes.read(source, request.name), request.name)
    return chosen[routes.QUERY] != chosen[routes.DOCUMENT]


def _build_router(
    request: BuildRequest, settings: Settings, candidate: bool, published: Published | None
) -> list[str]:
    """As `build`, of a model with a Router: each tower is built as a model of its own, and the
    model itself calls the tower of a text's input type.
    """
    if request.options.late_chunking:
        raise spans.unsupported(request.name, "has a Router, which does not take SPANS")
    if candidate:
        raise DeployError(
            f"{request.name} has a Router, and no candidate of it can be served beside it. Build "
            "it under another name."
        )
    with exclusive(request.name, settings) as folder:
        (folder / store.USED).touch()
        console.print(f"[bold]{request.name}[/]")
        parts, by_type = _towers_of_router(request, _source(request, folder))
        built = {
            tower: make(part, folder / f"tower-{tower}", settings)[0]
            for tower, part in parts.items()
        }
        facts = _router_facts(request, [one.spec for one in built.values()], by_type)
        with writing(settings.repository, REPOSITORY, BuildError):
            names = repository.write_router(facts, built, settings.repository)
            if request.alias:
                repository.write_aliases(names, settings.repository)
        if not names:
            raise QualityError(f"no precision of {request.name} reaches its bar in both towers.")
        console.print(f"  [green]✓[/] write: {', '.join(names)}")
    if published is not None:
        published(names)
    _evict(request.name, settings)
    return names


def _towers_of_router(
    request: BuildRequest, apart: Path
) -> tuple[dict[str, BuildRequest], dict[str, str]]:
    """The request for each tower of a model with a Router, all of one space, and input type →
    tower.
    """
    by_type = routes.load(apart)
    alone = {
        tower: describe.space_of(apart / tower, request.options)
        for tower in sorted(set(by_type.values()))
    }
    requests = {}
    for tower in alone:
        options = request.options._replace(
            name=f"{request.name}-{tower}", space=routes.space(alone)
        )
        requests[tower] = dataclasses.replace(request, options=options, source=apart / tower)
    return requests, by_type


def _router_facts(
    request: BuildRequest, towers_facts: list[ModelSpec], by_type: Mapping[str, str]
) -> ModelSpec:
    """The ModelSpec of a router.

    Raises:
        InvalidModel: its towers' vectors differ in length.
    """
    dims = {facts.dims for facts in towers_facts}
    if len(dims) > 1:
        raise InvalidModel(
            f"{request.name} has a Router whose routes give vectors of {sorted(dims)} dimensions; "
            "they must be equal, or queries and documents cannot be compared."
        )
    return dataclasses.replace(
        towers_facts[0],
        name=request.name,
        max_tokens=max(facts.max_tokens for facts in towers_facts),
        normalised=all(facts.normalised for facts in towers_facts),
        heads={},
        special_ids=(),
        static=False,
        length_buckets=(),
        routes=by_type,
    )


def _evict(built: str, settings: Settings) -> None:
    """Evict models from the store until it fits, but not the one that was just built."""
    for evicted in store.prune(
        settings.models, settings.repository, settings.store_limit_bytes, keep=built
    ):
        console.print(f"  [dim]evicted {evicted.name}, {evicted.size_bytes / 1e6:.0f} MB[/]")


def _of_candidate(request: BuildRequest, built: list[Built], folder: Path) -> list[Built]:
    """The towers with a precision that is served in another version; all where there is none.

    Raises:
        QualityError: nothing is left of the candidate because a precision misses its bar.
    """
    changed = [tower for tower in built if candidates.changed(tower, folder)]
    left_out = [p for p in request.precisions if not all(p in tower.models for tower in built)]
    if left_out and not changed:
        raise QualityError(
            f"no candidate of {request.name} was written: {' and '.join(left_out)} "
            f"{'misses its bar' if len(left_out) == 1 else 'miss their bars'}, and what else was "
            "built is served in this very version already."
        )
    return changed or built


def check_request(request: BuildRequest, settings: Settings, candidate: bool = False) -> None:
    """Raise what can be known to fail before any work.

    Raises:
        LicenceNotAccepted: as `check_licence`.
        HalimedeError: as `arguments.check`.
    """
    check_licence(request)
    quantised = "int8" in request.precisions
    arguments.check(
        request.name,
        settings.repository,
        candidate=candidate,
        alias=request.alias,
        calibration=request.calibration if quantised else None,
        calibration_images=request.calibration_images if quantised else None,
        sts_file=request.sts,
    )


def check_licence(request: BuildRequest) -> None:
    """Raise unless the model's licence needs no consent, or has it.

    Raises:
        LicenceNotAccepted: the licence restricts use and was not accepted by name.
    """
    row = request.source
    if isinstance(row, Path) or not row.restricted or request.accepted_licence == row.licence:
        return
    raise LicenceNotAccepted(
        f"{row.name} is under {row.licence}: {row.restricted} Read it; "
        f"then pass --accept-licence {row.licence}."
    )


def make(request: BuildRequest, folder: Path, settings: Settings) -> list[Built]:
    """The model's texts, and its images where it embeds any, in every precision of the request;
    steps that are missing are run. `folder` is the model's in the store.

    Raises:
        BuildError: a step failed.
    """
    *_, built = stages(request, folder, settings)
    return built


def stages(request: BuildRequest, folder: Path, settings: Settings) -> Iterator[list[Built]]:
    """As `make`, after each precision what is built so far. A precision that misses its bar is
    left out.

    Raises:
        BuildError: a step failed.
        QualityError: FP32 misses its bar, or no precision is left.
    """
    source = _source(request, folder)
    describe.check_memory(source, request.name, settings.memory_limit_bytes)
    memory_bytes = settings.memory_limit_bytes // SHARE_FOR_LONG_TEXTS
    parts = _exported_towers(request, source, folder, memory_bytes)
    for precision in request.precisions:
        parts = [_with_precision(part, precision, request) for part in parts]
        if precision == request.precisions[-1]:
            _check_not_empty(parts)
        yield _linked([part.built for part in parts])


def _exported_towers(
    request: BuildRequest, source: Path, folder: Path, memory_bytes: int
) -> list[TowerProgress]:
    """The model's towers, exported; no precision of them is built yet."""
    if takes_images_alone(source):
        exported = run_step(
            folder / "fp32",
            "export to ONNX, optimise (fp32)",
            partial(export.export_images, source, request.options),
        )
        facts = spec.load(exported)
        _warn_where_catalogue_differs(request, facts)
        return [_tower(request, source, towers.IMAGES, exported, Built(facts), memory_bytes)]
    exported = run_step(
        folder / "fp32",
        "export to ONNX, optimise (fp32)",
        partial(export.export, source, request.options),
    )
    facts = spec.load(exported)
    _warn_where_catalogue_differs(request, facts)
    texts = Built(facts, exported / text.FILE_NAME)
    if facts.image is None:
        tower = BY_KIND.get(facts.kind, towers.TEXTS)
        return [_tower(request, source, tower, exported, texts, memory_bytes)]
    if two_towers.lacks_preprocessing(source):
        console.print(
            f"  [yellow]! {request.name}: the folder has no {PREPROCESSING}. Its images are "
            "prepared as those of the model's published kin.[/]"
        )
    vision = run_step(
        folder / f"{IMAGE_STEP}fp32",
        f"export to ONNX, optimise ({IMAGE_STEP}fp32)",
        partial(export.export_images, source, request.options),
    )
    return [
        _tower(request, source, towers.TEXTS, exported, texts, memory_bytes),
        _tower(request, source, towers.IMAGES, vision, Built(facts), memory_bytes),
    ]


def _tower(
    request: BuildRequest,
    source: Path,
    tower: towers.Tower,
    exported: Path,
    built: Built,
    memory_bytes: int,
) -> TowerProgress:
    expected = run_step(
        _sibling(exported, "reference"),
        f"embed {tower.inputs} with the model itself",
        partial(check.write_reference, source, request.options, tower.inputs),
    )
    long = None
    if tower is not towers.IMAGES:
        long = run_step(
            _sibling(exported, "long-reference"),
            f"embed long {tower.inputs} with the model itself",
            partial(
                check.write_long_reference, source, request.options, tower.inputs, memory_bytes
            ),
        )
    calibration: list[Any] = []
    options = {}
    if "int8" in request.precisions:
        calibration, digests = _calibration(request, tower)
        options["int8"] = key_of(*digests)
    built = dataclasses.replace(built, device=request.device, options=options)
    return TowerProgress(tower, exported, expected, long, calibration, built)


def _calibration(request: BuildRequest, tower: towers.Tower) -> tuple[list[Any], list[str]]:
    """The inputs that INT8's ranges are taken from, and a digest of each."""
    if tower is not towers.IMAGES:
        texts: list[Any] = corpus.calibration(request.calibration)
        if tower is towers.PAIRS:
            texts = corpus.calibration_pairs(request.calibration)
        elif tower is towers.LABELLED:
            pairs = corpus.calibration_pairs(request.calibration)
            texts = corpus.texts_and_pairs(texts, pairs)
        elif tower is towers.LATE:
            texts = corpus.as_queries_and_documents(texts)
        return texts, texts if tower is towers.TEXTS else list(map(repr, texts))
    files = pictures.calibration(request.calibration_images)
    return files, [hashlib.sha256(file).hexdigest() for file in files]


def _with_precision(part: TowerProgress, precision: str, request: BuildRequest) -> TowerProgress:
    """The tower with one more precision, unless that misses its bar."""
    quantised = _quantised(part, precision)
    record = _checked(part, precision, quantised, request)
    if not _is_published(part.built.name, record, request):
        return part
    models = {**part.built.models, precision: quantised / session.FILE_NAME}
    quality = {**part.built.quality, precision: record}
    return dataclasses.replace(
        part, built=dataclasses.replace(part.built, models=models, quality=quality)
    )


def _quantised(part: TowerProgress, precision: str) -> Path:
    """The folder of a precision's step."""
    if precision == "fp32":
        return part.exported
    folder = _sibling(part.exported, precision)
    step = (
        partial(fp16.quantise, part.exported, part.tower.inputs, part.built.spec)
        if precision == "fp16"
        else partial(
            int8.quantise, part.exported, part.tower.inputs, part.built.spec, part.calibration
        )
    )
    return run_step(folder, f"quantise ({folder.name})", step)


def _checked(
    part: TowerProgress, precision: str, quantised: Path, request: BuildRequest
) -> dict[str, Any]:
    """The quality record of one precision."""
    inputs = part.tower.inputs
    checked = run_step(
        _sibling(part.exported, f"checked-{precision}"),
        f"check {inputs} in {precision} against the model itself",
        partial(
            check.write_record,
            precision,
            inputs,
            part.built.spec,
            part.exported,
            quantised,
            part.expected,
            part.long,
            request.sts,
            check.tool_versions(),
        ),
    )
    record: dict[str, Any] = json.loads((checked / check.RECORD_FILE).read_text())
    console.print(f"    {_summary(record)}")
    if record.get("engine") == towers.CPU_ENGINE:
        console.print(f"  [yellow]! {_why_cpu_engine(record)}[/]")
    checked_tokens, max_tokens = record.get("checked_tokens"), part.built.spec.max_tokens
    if checked_tokens and checked_tokens < max_tokens and precision == request.precisions[0]:
        console.print(
            f"  [yellow]! checked up to {checked_tokens} of {max_tokens} tokens: longer texts need "
            "more than the memory limit. Raise HALIMEDE_MEMORY_LIMIT_GIB, or lower --max-tokens."
            "[/]"
        )
    return record


def _why_cpu_engine(record: Mapping[str, Any]) -> str:
    """Why OpenVINO does not run a precision."""
    reasons = record.get("not_run_by", {}).get(towers.OPENVINO, ["it cannot be run by OpenVINO"])
    return (
        f"{record['precision']} is served by {towers.ENGINE_NAMES[towers.CPU_ENGINE]} on CPUs, not "
        f"by OpenVINO: {reasons[0]}."
    )


def _sibling(exported: Path, step: str) -> Path:
    """The folder of another step of the same tower."""
    return exported.with_name(exported.name.removesuffix("fp32") + step)


def _source(request: BuildRequest, folder: Path) -> Path:
    row = request.source
    if isinstance(row, Path):
        if routes.is_router(row):
            apart = run_step(
                folder / "routes",
                "take the routes apart",
                partial(routes.take_apart, row, request.name),
            )
            return apart if _has_router(request) else apart / routes.DOCUMENT
        describe.check_modules(row, request.name)
        return row
    sources = json.dumps(row.sources, default=dataclasses.asdict)
    # Not run_step: its sources and checksum name the content, whatever code fetches it.
    return cached_step(
        folder / "source",
        key_of("download", str(row.weights_sha256), sources, *HUB_FILES),
        "download",
        partial(download, row),
    )


def _linked(built: list[Built]) -> list[Built]:
    """The parts of one model, each knowing the precisions of the other."""
    if len(built) == 1:
        return built
    texts, images = built
    return [
        dataclasses.replace(texts, counterparts=tuple(images.models)),
        dataclasses.replace(images, counterparts=tuple(texts.models)),
    ]


def _is_published(name: str, record: Mapping[str, Any], request: BuildRequest) -> bool:
    """Whether a precision reaches its bar, or is accepted below it.

    Raises:
        QualityError: FP32 does neither.
    """
    precision, missed = record["precision"], "; ".join(record["missed"])
    if not missed or precision in request.accepted:
        return True
    right_up_to = record.get("right_up_to", 0)
    shorter = f"build it with --max-tokens {right_up_to}, or " if right_up_to else ""
    advice = f"{shorter}publish it all the same with --accept {precision}."
    line = f"{name} in {precision} is not published: {missed}. {advice[0].upper()}{advice[1:]}"
    if precision == "fp32":
        raise QualityError(line)
    console.print(f"  [yellow]! {line}[/]")
    return False


def _check_not_empty(parts: list[TowerProgress]) -> None:
    for part in parts:
        if not part.built.models:
            raise QualityError(f"no precision of {part.built.name} reaches its bar.")


def _warn_where_catalogue_differs(request: BuildRequest, facts: ModelSpec) -> None:
    """The catalogue is for finding models; where it and the folder differ, the folder is right."""
    row = request.source
    if isinstance(row, Path):
        return
    for name, listed, found in (
        ("dims", row.dims, facts.dims),
        ("max_tokens", row.max_tokens, facts.max_tokens),
    ):
        if listed != found:
            console.print(f"  [yellow]! {name}: the catalogue has {listed}, the folder {found}[/]")


SHOWN = {
    "mean_cosine": "mean cosine",
    "min_cosine": "lowest",
    "max_difference": "largest difference",
    "kendall_tau": "Kendall's tau",
    "ndcg_10": "NDCG@10",
    "label_agreement": "same label",
    "same_ids": "same tokens",
    "top_10": "top 10 tokens",
}
"""Figures of a quality record, and their names in what the build prints."""


def _summary(record: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{words} {record[name]:.6f}" for name, words in SHOWN.items() if name in record
    )
    return (
        f"{record['precision']}: {figures}, invariance {record['invariance']:.6f}, "
        f"{record['size_bytes'] / 1e6:.1f} MB ({record['size_ratio']:.2f})"
    )
