"""Reranking: candidates of one query in process, against sentence-transformers' CrossEncoder."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from halimede import Reranker
from halimede_tools.bench import report, torch_worker
from halimede_tools.build import plan
from halimede_tools.build.repository import served_name
from halimede_tools.console import console
from halimede_tools.settings import Settings

CANDIDATES, TOKENS = 100, 64
"""Documents of a query, and tokens of each pair."""
QUERY = "which word is it"
CALLS = 3
"""Calls in a row; the first is not counted."""
MIN_RATIO = 4.0
"""How many times as fast as CrossEncoder INT8 must be."""
TORCH = "CrossEncoder (torch)"
PACKAGES = ("onnxruntime-openvino", "sentence-transformers", "torch")
NAME = "reranker"


def bench_rerank(
    settings: Settings, folder: Path | None, precisions: Sequence[str], rounds: int
) -> Path:
    """Measure, print the table and write the report. Return the report's path.

    Without a folder of a reranker, one with the shape of MiniLM and random weights is measured:
    its scores mean nothing, its speed is that of a trained one.
    """
    with tempfile.TemporaryDirectory(dir=settings.home) as place:
        own = settings.model_copy(
            update={"repository": Path(place) / "models", "home": Path(place) / "home"}
        )
        source = folder or _random_reranker(settings, Path(place) / "source")
        request = plan.build_request(
            str(source), NAME, precisions=tuple(precisions), accepted=tuple(precisions)
        )
        plan.build(request, own)
        seconds = _measure(own, source, precisions, rounds)
    torch_s = statistics.median(seconds[TORCH])
    rows = [
        (way, f"{1000 * statistics.median(taken):.0f}", f"{torch_s / statistics.median(taken):.1f}")
        for way, taken in seconds.items()
    ]
    ratio = torch_s / statistics.median(seconds.get("int8", seconds[TORCH]))
    goal = report.Goal(
        f"int8 against {TORCH}", f"{ratio:.1f} times", f"at least {MIN_RATIO}", ratio >= MIN_RATIO
    )
    columns = ("precision", "ms", "times as fast")
    return report.publish(
        report.FOLDER / "rerank.md",
        "Reranking",
        [*report.goals([goal]), "", *report.table(columns, rows)],
        report.origin("halimede bench rerank", _described(folder), PACKAGES),
        [
            f"{CANDIDATES} documents of one query, pairs of about {TOKENS} tokens, in process; the "
            f"median of {rounds} rounds of {CALLS - 1} calls. In each round every way has its turn."
        ],
    )


def _described(folder: Path | None) -> str:
    return folder.name if folder else "a reranker with the shape of MiniLM-L6 and random weights"


def _measure(
    settings: Settings, source: Path, precisions: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call by way."""
    seconds: dict[str, list[float]] = {way: [] for way in (TORCH, *precisions)}
    documents = [
        " ".join([f"word {number}", *["word"] * (TOKENS - 10)]) for number in range(CANDIDATES)
    ]
    rerankers = {
        precision: Reranker(
            config={"models": {NAME: {
                "provider": "onnx", "model_id": served_name(NAME, precision),
                "path": str(settings.repository),
            }}}
        )
        for precision in precisions
    }  # fmt: skip
    console.print("  opening CrossEncoder …")
    with torch_worker.opened("CrossEncoder", source, "predict", CALLS) as torch:
        for number in range(rounds + 1):
            taken = {TORCH: torch([(QUERY, document) for document in documents])}
            for precision, reranker in rerankers.items():
                taken[precision] = _timed(reranker, documents)
            if number:  # the first round warms
                for way, measured in taken.items():
                    seconds[way] += measured[1:]
    for reranker in rerankers.values():
        reranker.close()
    return seconds


def _timed(reranker: Reranker, documents: list[str]) -> list[float]:
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        reranker.rank(QUERY, documents)
        seconds.append(time.perf_counter() - began)
    return seconds


def _random_reranker(settings: Settings, folder: Path) -> Path:
    """A cross-encoder with the shape and tokenizer of the default model, and random weights."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    default = settings.models / "all-MiniLM-L6-v2" / "source"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(default, num_labels=1)
    for part in (
        BertForSequenceClassification(config),  # type: ignore[no-untyped-call]
        AutoTokenizer.from_pretrained(default),  # type: ignore[no-untyped-call]
    ):
        part.save_pretrained(folder)
    return folder
