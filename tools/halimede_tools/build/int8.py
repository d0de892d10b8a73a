"""INT8: static quantisation (QDQ) of an FP32 model.onnx.

Dynamic quantisation takes its ranges from the whole batch, so a text's vector would depend on its
neighbours.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from halimede_engine import session
from halimede_ops import vectors
from halimede_ops.spec import ModelSpec
from halimede_tools.build import towers
from halimede_tools.build.graph import activations, outliers, rewrite, smoothing, tables
from halimede_tools.build.kinds import scores
from halimede_tools.build.towers import TOWERS, Bar, Tower, feed, with_engine
from halimede_tools.console import console

KEEP_COUNTS = (0, 1, 2, 4, 8)
"""How many of the MatMuls with the largest rounding loss stay in FP32, tried in turn."""
MARGIN = 0.0005
"""By how much the mean cosine to FP32 must exceed the bar of the mean cosine to the reference."""
ALWAYS_FP32 = (outliers.APART, rewrite.POOL)
"""Parts of nodes' names: the outliers' branch, and pooling."""


def quantise(
    exported: Path, inputs: str, spec: ModelSpec, calibration: Sequence[Any], folder: Path
) -> None:
    """Build step: write the INT8 model.onnx of an exported one, and a record of the attempts."""
    tower = TOWERS[inputs]
    fp32, int8 = exported / session.FILE_NAME, folder / session.FILE_NAME
    if spec.static:
        tables.to_int8(fp32, int8)
        return
    judged = tower.check_inputs()[tower.odd_inputs :: 3]
    attempts = to_int8(fp32, tower, spec, calibration, judged, int8)
    (folder / "quantised.json").write_text(json.dumps(attempts, indent=2))


def to_int8(
    fp32: Path,
    tower: Tower,
    spec: ModelSpec,
    calibration: Sequence[Any],
    inputs: Sequence[Any],
    target: Path,
) -> dict[str, Any]:
    """Write `target`: static QDQ INT8, activation ranges calibrated on the inputs given.

    Channels of outliers get a branch of their own in FP32, and the inputs of MatMuls are smoothed.
    While INT8 misses its bar on `inputs`, the next attempt leaves more of the MatMuls with the
    largest rounding loss in FP32, and the convolutions of a model that has several.

    Returns:
        The channels of outliers, the nodes left in FP32, and each attempt's agreement with FP32:
        the lowest mean cosine of a length class, or how far the scores rank alike.
    """
    rows = tower.rows(fp32.parent, spec)
    expected = with_engine(lambda engine: engine.embed(inputs), fp32, rows, spec)
    feeds = [feed(row) for row in rows(calibration)]
    model = rewrite.load(fp32)
    apart, ranked = _prepare(model, feeds)
    bar = tower.bars["int8"]
    attempts: list[dict[str, Any]] = []
    for kept in _kept(ranked, rewrite.convolutions(model)):
        _quantise(copy.deepcopy(model), feeds, kept, target)
        embeddings, lengths = with_engine(
            lambda engine: (engine.embed(inputs), engine.lengths(rows(inputs))), target, rows, spec
        )
        attempt = _judged(embeddings, expected, inputs, lengths, bar)
        attempts.append({"kept_fp32": kept, attempt.name: round(attempt.figure, 6)})
        console.print(
            f"    outliers of {len(apart)} MatMuls apart, {len(kept)} nodes in FP32: "
            f"{attempt.name} {attempt.figure:.6f}"
        )
        if attempt.passes:
            break
    return {"apart": apart, "kept_fp32": kept, "attempts": attempts}


def _kept(ranked: Sequence[str], convolutions: Sequence[str]) -> Iterator[list[str]]:
    """The nodes that each attempt leaves in FP32."""
    # OpenVINO 2025.4 gives wrong values for some convolutions in INT8, such as those between the
    # stages of ConvNeXt. A vision transformer has one, for its patches, which is right.
    convolutions = convolutions if len(convolutions) > 1 and ranked else []
    yield []
    if convolutions:
        yield [*convolutions]
    for count in KEEP_COUNTS[1:]:
        if ranked[:count] != ranked[: count // 2]:
            yield [*convolutions, *ranked[:count]]


class _Attempt(NamedTuple):
    """How well an INT8 model agrees with FP32."""

    name: str
    """What was measured."""
    figure: float
    passes: bool


def _judged(
    embeddings: np.ndarray,
    expected: np.ndarray,
    inputs: Sequence[Any],
    lengths: Sequence[int],
    bar: Bar | scores.ScoreBar,
) -> _Attempt:
    if isinstance(bar, scores.ScoreBar):
        figures = scores.agreement(embeddings, expected, inputs)
        name = "kendall_tau" if "kendall_tau" in figures else "label_agreement"
        missed = scores.missed(figures | {"invariance": 0.0, "size_ratio": 0.0}, bar)
        return _Attempt(name, figures[name], not missed)
    classes = towers.by_length(lengths, vectors.cosine(embeddings, expected))
    cosine = min(found.mean_cosine for found in classes)
    passes = cosine >= bar.mean_cosine + MARGIN and all(
        found.p1_cosine >= bar.p1_cosine for found in classes
    )
    return _Attempt("mean_cosine", cosine, passes)


def _prepare(
    model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]
) -> tuple[dict[str, list[int]], list[str]]:
    """Take outliers apart and smooth. The vectors of the model stay the same.

    Returns:
        MatMul → its channels of outliers, and all MatMuls, the one with the largest rounding loss
        first.
    """
    observed = activations.of_matmuls(model, feeds)
    found = {name: outliers.channels(activation) for name, activation in observed.items()}
    apart = outliers.take_apart(model, {name: some for name, some in found.items() if some})
    observed |= {name: observed[name].without(found[name]) for name in apart}
    smoothed = smoothing.smooth(model, observed)
    loss = {name: outliers.rounding_loss(activation) for name, activation in smoothed.items()}
    ranked = sorted(smoothed, key=loss.__getitem__, reverse=True)
    return {name: found[name] for name in apart}, ranked


def _quantise(
    model: onnx.ModelProto,
    feeds: Sequence[dict[str, np.ndarray]],
    kept: Sequence[str],
    target: Path,
) -> None:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Ours smooths every MatMul, not only those behind a layer norm: graph.smoothing.
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        ),
        ignored_scope=nncf.IgnoredScope(
            names=list(kept), patterns=[f".*{part}.*" for part in ALWAYS_FP32], validate=False
        ),
    )
    rewrite.dequantise_what_is_looked_up(quantised)
    rewrite.drop_zero_points(quantised)
    rewrite.save(quantised, target)
