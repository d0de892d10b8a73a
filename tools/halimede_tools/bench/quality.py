"""Quality: how near the vectors of each precision are to sentence-transformers', on any texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from halimede_engine import session
from halimede_ops import spec
from halimede_ops.errors import InvalidInput
from halimede_ops.lines import read_lines
from halimede_repository import configs
from halimede_tools.bench import report
from halimede_tools.build import check, plan, towers
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import sts
from halimede_tools.settings import Settings

PACKAGES = ("onnxruntime-openvino", "nncf", "sentence-transformers", "torch")
COLUMNS = "precision|arithmetic|tokens|texts|mean cosine|1st percentile|lowest|STS × 100"


def quality(settings: Settings, model: str, precisions: Sequence[str], file: Path) -> Path:
    """Compare each precision with sentence-transformers, print the table and write the report.

    Args:
        settings: whose repository and store have the model.
        model: name of the model.
        precisions: its precisions to compare.
        file: one text a line, or an STS file, whose sentences are compared and scored.

    Returns:
        The report's path.

    Raises:
        InvalidInput: the file cannot be read or has no text.
        ModelNotFound: the repository lacks a precision.
    """
    scored = file.suffix == ".tsv"
    given = sts.sentences(file) if scored else read_lines(file, "the file of texts")
    texts = sorted({text for text in given if text.strip()})
    if not texts:
        raise InvalidInput("the file has no text; give one text a line.")
    for precision in precisions:  # before the vectors of the reference, which take long
        configs.read(settings.repository, served_name(model, precision))
    source = settings.models / model / "source"
    expected = check.reference(source, texts, plan.build_request(model).options)
    rows = []
    for precision in precisions:
        engine, computed_in = _engine(settings, model, precision)
        cosines = check.cosines_to(engine.embed(texts), expected)
        classes = towers.by_length([row.length for row in engine.rows(texts)], cosines)
        score = f"{sts.spearman(file, engine.embed):.2f}" if scored else ""
        rows += [
            (precision, computed_in, *_cells(found), score)
            for found in [*classes, towers.length_class("all", cosines)]
        ]
    return report.publish(
        report.FOLDER / "quality.md",
        "Quality of each precision",
        report.table(COLUMNS.split("|"), rows),
        report.origin("halimede bench quality", model, PACKAGES),
        [
            f"Cosine to sentence-transformers in float32 on the {len(texts):,} texts of "
            f"`{file.name}`, which the build does not use. *tokens*: with special tokens."
        ],
    )


def _engine(settings: Settings, model: str, precision: str) -> tuple[towers.Engine, str]:
    """A served precision in this process, and the arithmetic that the build measured."""
    name = served_name(model, precision)
    served = configs.read(settings.repository, name)
    tokenizer, onnx = served.steps[f"{model}-tokenizer"], served.steps[f"{name}-onnx"]
    facts = spec.load(tokenizer)
    record = json.loads((served.folder / "quality.json").read_text())
    computed_in, engine = str(record["arithmetic"]), record.get("engine", towers.OPENVINO)
    rows = towers.text_rows(tokenizer, facts)
    path = onnx / session.FILE_NAME
    return towers.Engine(path, rows, facts, computed_in, name=engine), computed_in


def _cells(found: towers.LengthClass) -> tuple[object, ...]:
    return (
        found.tokens,
        found.inputs,
        f"{found.mean_cosine:.6f}",
        f"{found.p1_cosine:.6f}",
        f"{found.min_cosine:.4f}",
    )
