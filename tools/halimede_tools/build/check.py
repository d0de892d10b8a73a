"""Check: a built model.onnx against its reference on the same weights and inputs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from halimede_engine import arithmetic, session
from halimede_engine.session import file_bytes
from halimede_ops import vectors
from halimede_ops.errors import BuildError
from halimede_ops.spec import ModelSpec
from halimede_tools.build import describe, towers
from halimede_tools.build.checks import long_texts
from halimede_tools.build.checks.long_texts import LongText
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.kinds import activation, chat, late, overlap, ranks, scores, static
from halimede_tools.build.kinds.recognise import recognise
from halimede_tools.build.samples.sts import spearman
from halimede_tools.build.towers import CPU_ENGINE, TEXTS, TOWERS, Bar, Engine, EngineError, Tower
from halimede_tools.build.vision import encoder

TOOLS = ("torch", "sentence-transformers", "optimum-onnx", "onnx", "onnxruntime-openvino", "nncf")
"""Distributions whose versions a quality record names."""
REFERENCE_FILE = "reference.npy"
RECORD_FILE = "quality.json"
LONG_FILE = "long.json"
"""The long texts that a model is checked on, and the numbers of tokens that its config names."""
LOGITS_BYTES = 2**30
"""Memory for the logits of the texts that SparseEncoder encodes together."""


def tool_versions() -> dict[str, str]:
    """The version of each of TOOLS."""
    return {name: importlib.metadata.version(name) for name in TOOLS}


def write_reference(source: Path, options: ModelOptions, inputs: str, folder: Path) -> None:
    """Build step: the vectors that the model in `source` gives for a tower's check inputs."""
    embed = REFERENCES[inputs]
    np.save(folder / REFERENCE_FILE, embed(source, TOWERS[inputs].check_inputs(), options))


def write_long_reference(
    source: Path, options: ModelOptions, inputs: str, memory_bytes: int, folder: Path
) -> None:
    """Build step: long texts, and what the model in `source` gives for each alone.

    `memory_bytes` is the memory for attention scores, and for the logits of a vocabulary: longer
    texts are not checked.
    """
    model = describe.load(source, options)
    facts = describe.describe(model, source, options)
    config = describe.transformer_config(model)
    named = long_texts.thresholds(config)
    limit = facts.max_tokens if facts.static else long_texts.longest(config, memory_bytes)
    if TOWERS[inputs] is towers.WEIGHTED:
        limit = min(limit, memory_bytes // _logits_bytes(model, source, options))
    prompt = "" if facts.template else model.prompts.get(model.default_prompt_name or "", "")
    count = chat.counter(model, facts) if facts.template else describe.token_counter(model)
    sizes = long_texts.lengths(facts.max_tokens, sorted(named), limit)
    if facts.static:  # no attention, and one branch for all lengths
        sizes = [facts.max_tokens]
    texts = long_texts.texts(sizes, lambda text: count(prompt + text))
    with describe.quiet():
        long = [("", text) for text in texts] if facts.template else texts
        expected = REFERENCES[inputs](source, long, options, 1)
    np.save(folder / REFERENCE_FILE, expected)
    written = {"texts": long, "thresholds": {key: number for number, key in named.items()}}
    (folder / LONG_FILE).write_text(json.dumps(written, indent=2))


def write_record(
    precision: str,
    inputs: str,
    spec: ModelSpec,
    exported: Path,
    quantised: Path,
    expected: Path,
    long: Path | None,
    sts: Path | None,
    tools: Mapping[str, str],
    folder: Path,
) -> None:
    """Build step: the quality record of one precision of a tower.

    `exported` is the folder of FP32, `quantised` that of the precision, `expected` that of the
    reference, `long` that of the reference of long texts; `sts` is a file to score texts on;
    `tools` are the versions that the record names.
    """
    tower = TOWERS[inputs]
    model, fp32 = quantised / session.FILE_NAME, exported / session.FILE_NAME
    references = np.load(expected / REFERENCE_FILE)

    def measure(way: Way) -> tuple[dict[str, Any], Engine]:
        rows = tower.rows(exported, spec)
        engine = Engine(model, rows, spec, way.arithmetic, name=way.engine)
        record = check(
            precision, model, fp32, engine, tower, tower.check_inputs(), references, tools
        )
        if long is not None:
            add_long_texts(record, engine, long, tower.bars[precision])
        return record | {"arithmetic": way.arithmetic, "engine": way.engine}, engine

    record, engine = first_right(measure, ways(precision), spec.name)
    attempts = quantised / "quantised.json"
    if attempts.exists():
        record |= json.loads(attempts.read_text())
    if sts is not None and tower is TEXTS:
        record["sts_spearman"] = round(spearman(sts, engine.embed), 3)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2))


class Way(NamedTuple):
    """One way to run a precision on this CPU."""

    engine: str
    arithmetic: str


def ways(precision: str) -> list[Way]:
    """The ways to run a precision on this CPU, the fastest first."""
    computed = arithmetics(precision)
    return [*(Way(towers.OPENVINO, each) for each in computed), Way(CPU_ENGINE, computed[-1])]


def first_right(
    measure: Callable[[Way], tuple[dict[str, Any], Engine]], tried: Sequence[Way], name: str
) -> tuple[dict[str, Any], Engine]:
    """The record and the engine of the first way that reaches the bar; if none does, those of the
    last way with OpenVINO, or of onnxruntime's own CPU engine where OpenVINO cannot run the model.

    The record of a way that reaches the bar names what the ways before it miss.

    Raises:
        EngineError: no way runs the model.
    """
    found: tuple[dict[str, Any], Engine] | None = None
    below: dict[Way, list[str]] = {}
    failed: list[EngineError] = []
    for way in tried:
        if way.engine == CPU_ENGINE and found and not _engine_can_matter(found[0]["missed"]):
            break
        try:
            record, engine = measure(way)
        except EngineError as error:
            failed.append(error)
            below[way] = [str(error)]
            continue
        if not record["missed"]:
            return record | _missed_before(way, below), engine
        if way.engine != CPU_ENGINE:
            found = record, engine
        elif found is None:
            found = record | _missed_before(way, below), engine
        below[way] = record["missed"]
    if found is None:
        raise towers.no_engine(name, failed)
    return found


def _engine_can_matter(missed: Sequence[str]) -> bool:
    """Whether another engine might not miss what was missed. The size of a file is always the
    same.
    """
    return not all(figure.startswith("size_ratio ") for figure in missed)


def _missed_before(right: Way, below: Mapping[Way, list[str]]) -> dict[str, Any]:
    if right.engine == CPU_ENGINE:
        return {"not_run_by": {way.engine: missed for way, missed in below.items()}}
    if below:
        return {"not_computed_in": {way.arithmetic: missed for way, missed in below.items()}}
    return {}


def arithmetics(precision: str) -> list[str]:
    """The arithmetics in which this CPU can compute a precision, the fastest first. The first that
    reaches the precision's bar is served.
    """
    if precision == "int8":
        return [arithmetic.INT8]
    is_fast = precision == "fp16" and arithmetic.has_bf16()
    return [arithmetic.BF16, arithmetic.F32] if is_fast else [arithmetic.F32]


def reference(
    source: Path, texts: Sequence[str], options: ModelOptions, batch_size: int = 32
) -> np.ndarray:
    """sentence-transformers' embeddings of the texts: `[len(texts), dims]` float32."""
    model = describe.load(source, options)
    if static.is_static(source):
        return np.asarray(static.reference(model, list(texts)))
    return np.asarray(model.encode(list(texts), batch_size=batch_size, show_progress_bar=False))


def sparse_reference(
    source: Path, texts: Sequence[str], options: ModelOptions, batch_size: int = 32
) -> np.ndarray:
    """SparseEncoder's weights of the texts: `[len(texts), dims]` float32."""
    model = describe.load(source, options)
    text_bytes = model.max_seq_length * _logits_bytes(model, source, options)
    rows = model.encode(
        list(texts),
        batch_size=max(1, min(batch_size, LOGITS_BYTES // text_bytes)),
        convert_to_sparse_tensor=False,
        show_progress_bar=False,
    )
    return np.asarray(rows)


def _logits_bytes(model: Any, source: Path, options: ModelOptions) -> int:
    """Memory of one token's logits in a SparseEncoder, which copies them once."""
    return 2 * 4 * describe.describe(model, source, options).dims


def image_reference(source: Path, files: Sequence[bytes], options: ModelOptions) -> np.ndarray:
    """The vectors that transformers gives for images, in PyTorch: `[len(files), dims]` float32.

    Their L2 norm is 1 if the model's vectors are normalised.
    """
    import torch
    from transformers.image_utils import load_image

    module, facts = encoder.load(source, options)
    prepare = encoder.image_processor(source, options.name)
    embeddings = []
    for file in files:
        picture = load_image(Image.open(io.BytesIO(file)))
        # Without the format, a picture 3 pixels high is taken for one with channels first.
        pixels = prepare(picture, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            embeddings.append(module(pixels.pixel_values.float()).numpy())
    stacked = np.concatenate(embeddings)
    return vectors.normalise(stacked) if facts.normalised else stacked


def score_reference(
    source: Path, inputs: Sequence[Any], options: ModelOptions, batch_size: int = 32
) -> np.ndarray:
    """CrossEncoder's scores of texts, pairs, or both: `[len(inputs), labels]` float32."""
    import torch

    model = describe.load(source, options).eval()
    kind = recognise(source, options.name, options.kind)
    activated = activation.activation(model, source, kind)
    prompt = model.prompts.get(model.default_prompt_name or "")
    scores: dict[int, np.ndarray] = {}
    for form in (str, tuple):
        rows = [row for row, item in enumerate(inputs) if isinstance(item, form)]
        rows.sort(key=lambda row: len(str(inputs[row])), reverse=True)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            # Not `predict`, which takes a list of texts for one pair.
            features = model.preprocess([inputs[row] for row in batch], prompt=prompt)
            with torch.no_grad():
                scores |= zip(batch, activated(model(features)["scores"]).numpy(), strict=True)
    return np.stack([scores[row] for row in range(len(inputs))]).astype(np.float32)


def late_reference(
    source: Path, inputs: Sequence[Any], options: ModelOptions, batch_size: int = 32
) -> np.ndarray:
    """The vectors of queries and documents by the definition of ColBERT and PyLate, one input after
    another: `[vectors, dims]` float32.
    """
    model = describe.load(source, options)
    return late.reference(model, describe.describe(model, source, options), inputs, batch_size)


REFERENCES: Mapping[str, Callable[..., np.ndarray]] = {
    towers.TEXTS.inputs: reference,
    towers.IMAGES.inputs: image_reference,
    towers.PAIRS.inputs: score_reference,
    towers.LABELLED.inputs: score_reference,
    towers.WEIGHTED.inputs: sparse_reference,
    towers.LATE.inputs: late_reference,
}
"""What gives the reference for the inputs of each tower."""


def check(
    precision: str,
    model: Path,
    fp32: Path,
    engine: Engine,
    tower: Tower,
    inputs: Sequence[Any],
    expected: np.ndarray,
    tools: Mapping[str, str],
) -> dict[str, Any]:
    """The quality record of one built file: agreement with the reference, invariance, size, tools,
    missed bars.
    """
    bar = tower.bars[precision]
    kept = _with_tokens(engine, inputs)
    odd_inputs = sum(index < tower.odd_inputs for index in kept)
    expected = _of_inputs(engine, inputs, expected, kept)
    inputs = [inputs[index] for index in kept]
    together = embedded(engine, inputs)
    if isinstance(bar, scores.ScoreBar):
        figures = scores.agreement(together, expected, inputs)
    else:
        rows = engine.rows(inputs)
        odd_vectors = sum(engine.counts(rows[:odd_inputs]))
        figures = _cosines(together, expected, engine.lengths(rows), odd_vectors)
        if isinstance(bar, towers.SparseBar):
            figures |= overlap.agreement(together, expected)
        if isinstance(bar, towers.LateBar):
            figures |= ranks.agreement(together, expected, engine.counts(rows), inputs)
    size_bytes, fp32_bytes = file_bytes(model), file_bytes(fp32)
    record: dict[str, Any] = {
        "model": engine.spec.name,
        "precision": precision,
        "space": engine.spec.space,
        tower.inputs: len(inputs),
        **_rounded(figures),
        "invariance": round(_invariance(engine, inputs, together, bar), 6),
        "not_finite": int((~np.isfinite(together)).any(axis=1).sum()),
        "size_bytes": size_bytes,
        "size_ratio": round(size_bytes / fp32_bytes, 4),
        "bar": dataclasses.asdict(bar),
        "tools": dict(tools),
    }
    return record | {"missed": missed(record, bar)}


def _with_tokens(engine: Engine, inputs: Sequence[Any]) -> list[int]:
    """Indices of the inputs that a server answers: a text without tokens gets an error, and
    sentence-transformers gives it whatever its padding gives.
    """
    lengths = [row.length for row in engine.rows(inputs)]
    return [index for index, length in enumerate(lengths) if length or engine.spec.static]


def _of_inputs(
    engine: Engine, inputs: Sequence[Any], expected: np.ndarray, kept: Sequence[int]
) -> np.ndarray:
    """The vectors of the reference for some inputs, which may have several each.

    Raises:
        BuildError: the reference has another number of vectors for all inputs.
    """
    rows = engine.rows(inputs)
    ours = sum(engine.counts(rows))
    if len(expected) != ours:
        raise BuildError(
            f"{engine.spec.name} gives {ours:,} vectors for the texts of the check, and its "
            f"reference {len(expected):,}: they do not read the texts alike."
        )
    return np.asarray(expected[engine.places(rows, kept)])


def _cosines(
    embeddings: np.ndarray, expected: np.ndarray, lengths: Sequence[int], odd: int
) -> dict[str, Any]:
    """The cosines to the reference, over all vectors and by the length class of their inputs; the
    first `odd` vectors are in no class.
    """
    cosines = cosines_to(embeddings, expected)
    classes = towers.by_length(lengths[odd:], cosines[odd:])
    return {
        "mean_cosine": float(cosines.mean()),
        "p1_cosine": min(found.p1_cosine for found in classes),
        "min_cosine": float(cosines.min()),
        "by_length": [_rounded(found._asdict()) for found in classes],
    }


def add_long_texts(
    record: dict[str, Any], engine: Engine, reference: Path, bar: Bar | scores.ScoreBar
) -> None:
    """Measure long texts, each alone, and add to a record how far they agree with the reference,
    the tokens of the longest, and what they miss of the bar.
    """
    written = json.loads((reference / LONG_FILE).read_text())
    named = {number: key for key, number in written["thresholds"].items()}
    inputs = [text if isinstance(text, str) else tuple(text) for text in written["texts"]]
    rows, expected = engine.rows(inputs), np.load(reference / REFERENCE_FILE)
    pooled = np.concatenate([engine.run([row]) for row in rows])
    if isinstance(bar, scores.ScoreBar):
        agreements, least = 1 - np.abs(pooled - expected).max(axis=1), 1 - bar.max_difference
    else:
        # The vectors of a text count as one: their mean.
        starts = np.cumsum([0, *engine.counts(rows)[:-1]])
        agreements = np.add.reduceat(cosines_to(pooled, expected), starts) / engine.counts(rows)
        least = bar.p1_cosine
    found = [
        LongText(row.length, round(float(agreement), 6))
        for row, agreement in zip(rows, agreements, strict=True)
    ]
    record["long_texts"] = [text._asdict() for text in found]
    record["checked_tokens"] = max(text.tokens for text in found)
    below = long_texts.missed(found, named, least)
    if below:
        record["missed"] += below
        record["right_up_to"] = long_texts.right_up_to(found, least)


def embedded(engine: Engine, inputs: Sequence[Any]) -> np.ndarray:
    """As `engine.embed`, but rows that are not finite are returned as they are."""
    pooled = engine.run(engine.rows(inputs))
    finite = np.isfinite(pooled).all(axis=1)
    pooled[finite] = vectors.embed(pooled[finite], engine.spec)
    return pooled


def cosines_to(embeddings: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The cosine of each row to the same row of `expected`, `[rows]` float32; -1, below every bar,
    where one of them is not finite. Two zero vectors are equal: their cosine is 1.
    """
    finite = np.isfinite(embeddings).all(axis=1) & np.isfinite(expected).all(axis=1)
    cosines = np.full(len(embeddings), -1, np.float32)
    cosines[finite] = vectors.cosine(embeddings[finite], expected[finite])
    # A text without tokens has zeros in both.
    cosines[~embeddings.any(axis=1) & ~expected.any(axis=1)] = 1
    return cosines


def _rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in record.items()
    }


def _invariance(
    engine: Engine, inputs: Sequence[Any], together: np.ndarray, bar: Bar | scores.ScoreBar
) -> float:
    """Lowest cosine of an input that runs alone to the same input sorted among all, and to it in a
    small random batch, where a text is padded to a neighbour's length. For scores, the largest
    difference, as a share of their range.
    """
    rows = engine.rows(inputs)
    order = random.Random(4).sample(range(len(rows)), len(rows))
    singles = engine.run_each([[row] for row in rows])
    batched = np.empty_like(singles)
    batched[engine.places(rows, order)] = engine.run_each(
        [[rows[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
    )
    if isinstance(bar, scores.ScoreBar):
        largest = max(float(np.abs(singles - other).max()) for other in (together, batched))
        return largest / scores.spread(together)
    return float(min(cosines_to(singles, other).min() for other in (together, batched)))


def missed(record: dict[str, Any], bar: Bar | scores.ScoreBar) -> list[str]:
    """What a record misses of its precision's bar: each figure with its bar."""
    if isinstance(bar, scores.ScoreBar):
        return scores.missed(record, bar)
    below = [
        f"{name} is {record[name]}, the bar is {least}"
        for name, least in (("mean_cosine", bar.mean_cosine), ("invariance", bar.invariance))
        if not record[name] >= least
    ]
    below += [
        f"{name} of {found['tokens']} tokens is {found[name]}, the bar is {least}"
        for found in record["by_length"]
        for name, least in (("mean_cosine", bar.mean_cosine), ("p1_cosine", bar.p1_cosine))
        if not found[name] >= least
    ]
    if isinstance(bar, towers.SparseBar) and not record["same_ids"] >= bar.same_ids:
        below.append(f"same_ids is {record['same_ids']}, the bar is {bar.same_ids}")
    if isinstance(bar, towers.LateBar):
        below += [
            f"{name} is {record[name]}, the bar is {getattr(bar, name)}"
            for name in ranks.RANKS
            if not record[name] >= getattr(bar, name)
        ]
    if record["not_finite"]:
        below.append(f"{record['not_finite']} vectors are not finite")
    if record["size_ratio"] > bar.size_ratio:
        below.append(f"size_ratio is {record['size_ratio']}, the bar is {bar.size_ratio}")
    return below
