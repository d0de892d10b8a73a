"""Shadow: embed the same texts with a model and its candidate; compare vectors and latencies."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halimede import Config, Embedder
from halimede.extras import import_optional
from halimede.providers.triton.provider import Options
from halimede_ops import vectors
from halimede_tools.build import candidates

FILE_NAME = "shadow.json"
"""The record, in the candidate's version folder under its model's name."""
SAMPLE_TEXTS = 300
"""Number of built-in texts to compare on."""
TIMED_TEXTS = 50
"""Number of texts that are also sent alone, to both in turn, to measure latency."""
COSINE_PERCENTILES = (1, 5, 50)
LATENCY_PERCENTILES = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Shadow:
    """Result of a comparison."""

    model: str
    served: int
    """Served version."""
    candidate: int
    """Version of the candidate."""
    texts: int
    same_space: bool
    """Whether both embed into one space. If not, the cosines mean little."""
    cosine: Mapping[str, float]
    """Cosine of a text's two vectors: mean, min and percentiles, such as p1. Empty if the vectors
    differ in length."""
    served_ms: Mapping[str, float]
    """Latency of a text sent alone, in milliseconds: mean and percentiles."""
    candidate_ms: Mapping[str, float]


def compare(name: str, server: Options, texts: Sequence[str]) -> Shadow:
    """Compare an ensemble and its candidate, both on this server, on these texts.

    Raises:
        HalimedeError: one of the two does not answer.
    """
    candidate_name = candidates.candidate_name(name)
    with _embedder(name, server) as served, _embedder(candidate_name, server) as candidate:
        served_result, candidate_result = served.embed(texts), candidate.embed(texts)
        seconds = [
            (_seconds(served, text), _seconds(candidate, text)) for text in texts[:TIMED_TEXTS]
        ]
    same_shape = served_result.vectors.shape == candidate_result.vectors.shape
    served_ms, candidate_ms = 1000 * np.array(seconds).T
    return Shadow(
        model=name,
        served=int(served_result.versions[0]),
        candidate=int(candidate_result.versions[0]),
        texts=len(texts),
        same_space=served_result.space == candidate_result.space,
        cosine=_cosines(vectors.cosine(served_result.vectors, candidate_result.vectors))
        if same_shape
        else {},
        served_ms=_statistics(served_ms, LATENCY_PERCENTILES, 2),
        candidate_ms=_statistics(candidate_ms, LATENCY_PERCENTILES, 2),
    )


def write_record(comparison: Shadow, repository: Path) -> None:
    """Write a comparison into the candidate's version folder."""
    folder = repository / comparison.model / str(comparison.candidate)
    (folder / FILE_NAME).write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")


def table_rows(comparisons: Iterable[Shadow]) -> Iterator[dict[str, Any]]:
    """Rows of a table: two for each comparison."""
    for comparison in comparisons:
        yield {
            "model": comparison.model,
            "version": comparison.served,
            "role": "served",
            **_latency_columns(comparison.served_ms),
        }
        drift = {f"cosine {name}": value for name, value in comparison.cosine.items()}
        role = {"model": "", "version": comparison.candidate, "role": "candidate"}
        yield {
            **role,
            **_latency_columns(comparison.candidate_ms),
            **drift,
            "same space": comparison.same_space,
        }


def export(comparisons: Iterable[Shadow], path: Path) -> None:
    """Write comparisons as a metrics file for node_exporter's textfile collector.

    Raises:
        MissingExtra: prometheus-client is not installed.
    """
    prometheus = import_optional("prometheus_client", "metrics")
    registry = prometheus.CollectorRegistry()
    labels = ("model", "version", "statistic")
    cosine = prometheus.Gauge(
        "halimede_shadow_cosine",
        "Cosine of a text's vectors by the candidate and by the served version.",
        labels,
        registry=registry,
    )
    seconds = prometheus.Gauge(
        "halimede_shadow_seconds", "Seconds to embed one text.", labels, registry=registry
    )
    for comparison in comparisons:
        for name, value in comparison.cosine.items():
            cosine.labels(comparison.model, comparison.candidate, name).set(value)
        for version, figures in (
            (comparison.served, comparison.served_ms),
            (comparison.candidate, comparison.candidate_ms),
        ):
            for name, value in figures.items():
                seconds.labels(comparison.model, version, name).set(value / 1000)
    prometheus.write_to_textfile(str(path), registry)


def _embedder(model: str, server: Options) -> Embedder:
    """An embedder of exactly this model: it does not follow a canary."""
    options = server.model_copy(update={"model_id": model, "follow_canary": False})
    config = {"models": {model: options}, "default_model": model}
    return Embedder(config=Config.model_validate(config))


def _seconds(embedder: Embedder, text: str) -> float:
    began = time.perf_counter()
    embedder.embed(text)
    return time.perf_counter() - began


def _cosines(values: np.ndarray) -> dict[str, float]:
    return {"min": round(float(values.min()), 6), **_statistics(values, COSINE_PERCENTILES, 6)}


def _statistics(values: np.ndarray, percentiles: Sequence[int], digits: int) -> dict[str, float]:
    named = {f"p{rank}": np.percentile(values, rank) for rank in percentiles}
    figures = {"mean": values.mean(), **named}
    return {name: round(float(value), digits) for name, value in figures.items()}


def _latency_columns(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"ms {name}": value for name, value in figures.items()}
