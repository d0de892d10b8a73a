"""Check: a built model.onnx against sentence-transformers on the same weights and texts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halimede_ops import session, text, vectors
from halimede_ops.session import file_bytes
from halimede_ops.spec import ModelSpec
from tools import config, describe
from tools.describe import Reading


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a precision must reach to be published."""

    mean_cosine: float
    """Mean cosine to sentence-transformers in float32."""
    invariance: float
    """Lowest cosine of a text alone to the same text in a batch, and in wider padding."""
    size_ratio: float
    """Largest file size against FP32."""


BARS = {
    "fp32": Bar(mean_cosine=0.99999, invariance=0.99999, size_ratio=1.0),
    "fp16": Bar(mean_cosine=0.9999, invariance=0.9999, size_ratio=0.52),
    "int8": Bar(mean_cosine=0.995, invariance=0.9999, size_ratio=0.30),
}
TOOLS = ("torch", "sentence-transformers", "optimum-onnx", "onnx", "onnxruntime-openvino", "nncf")


def reference(source: Path, texts: Sequence[str], reading: Reading) -> np.ndarray:
    """sentence-transformers' embeddings of the texts: `[len(texts), dims]` float32."""
    model = describe.load(source, reading)
    return np.asarray(model.encode(list(texts), batch_size=32, show_progress_bar=False))


class Engine:
    """A text's whole way in one process, as the served configs run it: tokenize, run, embed."""

    def __init__(self, model: Path, tokenizer_folder: Path, spec: ModelSpec) -> None:
        cores = len(os.sched_getaffinity(0))
        accelerators = [session.Accelerator(name) for name in config.CPU_ACCELERATORS]
        self.spec = spec
        self.tokenizer = text.load(tokenizer_folder, spec)
        self.session, _ = session.open_session(
            model, accelerators, cores, streams=cores, max_tokens=spec.max_tokens
        )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings `[len(texts), dims]` float32, in order."""
        return vectors.embed(self.session.run(self.rows(texts)), self.spec)

    def rows(self, texts: Sequence[str]) -> list[session.Row]:
        """The texts' token rows."""
        tokens = self.tokenizer.encode(texts, [None] * len(texts))
        return session.rows(row.ids for row in tokens)


def check(
    precision: str,
    model: Path,
    fp32: Path,
    engine: Engine,
    texts: Sequence[str],
    expected: np.ndarray,
) -> dict[str, Any]:
    """The quality record of one built file: cosines, invariance, size, tools, missed bars."""
    together = engine.embed(texts)
    cosines = vectors.cosine(together, expected)
    size_bytes, fp32_bytes = file_bytes(model), file_bytes(fp32)
    record: dict[str, Any] = {
        "model": engine.spec.name,
        "precision": precision,
        "space": engine.spec.space,
        "texts": len(texts),
        "mean_cosine": round(float(cosines.mean()), 6),
        "min_cosine": round(float(cosines.min()), 6),
        "invariance": round(_invariance(engine, texts, together), 6),
        "size_bytes": size_bytes,
        "size_ratio": round(size_bytes / fp32_bytes, 4),
        "bar": dataclasses.asdict(BARS[precision]),
        "tools": {name: importlib.metadata.version(name) for name in TOOLS},
    }
    return record | {"missed": missed(record, BARS[precision])}


def _invariance(engine: Engine, texts: Sequence[str], together: np.ndarray) -> float:
    """Lowest cosine between each text sorted among all, alone, and in a small random batch, where
    it is padded to a neighbour's length.
    """
    rows = engine.rows(texts)
    order = random.Random(4).sample(range(len(rows)), len(rows))
    alone = np.concatenate([engine.session.run_together([row]) for row in rows])
    beside = np.empty_like(alone)
    for start in range(0, len(order), 8):
        part = order[start : start + 8]
        beside[part] = engine.session.run_together([rows[i] for i in part])
    return float(min(vectors.cosine(alone, other).min() for other in (together, beside)))


def missed(record: dict[str, Any], bar: Bar) -> list[str]:
    """What a record misses of its precision's bar: each figure with its bar."""
    below = [
        f"{name} is {record[name]}, the bar is {least}"
        for name, least in (("mean_cosine", bar.mean_cosine), ("invariance", bar.invariance))
        if record[name] < least
    ]
    if record["size_ratio"] > bar.size_ratio:
        below.append(f"size_ratio is {record['size_ratio']}, the bar is {bar.size_ratio}")
    return below
