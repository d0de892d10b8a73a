"""Shadow: a candidate on the texts that its model is asked, beside it: how far vectors move, and
how long both take.
"""

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
TEXTS = 300
"""Built-in texts to compare on."""
TIMED = 50
"""Texts that are also sent alone, to both in turn, and timed."""
COSINES = (1, 5, 50)
LATENCIES = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Shadow:
    """What a comparison found."""

    model: str
    served: int
    """Version that is served."""
    candidate: int
    """Version that may follow it."""
    texts: int
    same_space: bool
    """Whether vectors of both may be compared: if not, the cosines say little."""
    cosine: Mapping[str, float]
    """Of a text's two vectors: mean, min and percentiles, such as p1: one in a hundred is lower;
    none where their lengths differ."""
    served_ms: Mapping[str, float]
    """Milliseconds of a text alone: mean and percentiles."""
    candidate_ms: Mapping[str, float]


def compare(name: str, server: Options, texts: Sequence[str]) -> Shadow:
    """An ensemble and its candidate, both on this server, on these texts.

    Raises:
        HalimedeError: one of them does not answer.
    """
    beside = candidates.candidate_name(name)
    with _opened(name, server) as served, _opened(beside, server) as candidate:
        now, then = served.embed(texts), candidate.embed(texts)
        seconds = [(_timed(served, text), _timed(candidate, text)) for text in texts[:TIMED]]
    alike = now.vectors.shape == then.vectors.shape
    served_ms, candidate_ms = 1000 * np.array(seconds).T
    return Shadow(
        model=name,
        served=int(now.versions[0]),
        candidate=int(then.versions[0]),
        texts=len(texts),
        same_space=now.space == then.space,
        cosine=_cosines(vectors.cosine(now.vectors, then.vectors)) if alike else {},
        served_ms=_figures(served_ms, LATENCIES, 2),
        candidate_ms=_figures(candidate_ms, LATENCIES, 2),
    )


def record(found: Shadow, repository: Path) -> None:
    """Write what was found beside the candidate's version."""
    folder = repository / found.model / str(found.candidate)
    (folder / FILE_NAME).write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")


def rows(found: Iterable[Shadow]) -> Iterator[dict[str, Any]]:
    """What was found as a table's rows: two an ensemble."""
    for one in found:
        yield {"model": one.model, "version": one.served, "role": "served", **_ms(one.served_ms)}
        drift = {f"cosine {name}": value for name, value in one.cosine.items()}
        role = {"model": "", "version": one.candidate, "role": "candidate"}
        yield {**role, **_ms(one.candidate_ms), **drift, "same space": one.same_space}


def export(found: Iterable[Shadow], path: Path) -> None:
    """Write what was found as a text file of metrics, as node_exporter's collector reads them.

    Raises:
        MissingExtra: prometheus-client is not installed.
    """
    prometheus = import_optional("prometheus_client", "metrics")
    registry = prometheus.CollectorRegistry()
    labels = ("model", "version", "statistic")
    cosine = prometheus.Gauge(
        "halimede_shadow_cosine",
        "Cosine of a text's vector by the candidate to the one that is served.",
        labels,
        registry=registry,
    )
    seconds = prometheus.Gauge(
        "halimede_shadow_seconds", "Seconds that a text alone took.", labels, registry=registry
    )
    for one in found:
        for name, value in one.cosine.items():
            cosine.labels(one.model, one.candidate, name).set(value)
        for version, figures in ((one.served, one.served_ms), (one.candidate, one.candidate_ms)):
            for name, value in figures.items():
                seconds.labels(one.model, version, name).set(value / 1000)
    prometheus.write_to_textfile(str(path), registry)


def _opened(model: str, server: Options) -> Embedder:
    """An embedder of this very model: it follows no canary."""
    options = server.model_copy(update={"model_id": model, "follow_canary": False})
    given = {"models": {model: options}, "default_model": model}
    return Embedder(config=Config.model_validate(given))


def _timed(embedder: Embedder, text: str) -> float:
    began = time.perf_counter()
    embedder.embed(text)
    return time.perf_counter() - began


def _cosines(values: np.ndarray) -> dict[str, float]:
    return {"min": round(float(values.min()), 6), **_figures(values, COSINES, 6)}


def _figures(values: np.ndarray, percentiles: Sequence[int], digits: int) -> dict[str, float]:
    named = {f"p{one}": np.percentile(values, one) for one in percentiles}
    figures = {"mean": values.mean(), **named}
    return {name: round(float(value), digits) for name, value in figures.items()}


def _ms(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"ms {name}": value for name, value in figures.items()}
