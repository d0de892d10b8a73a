"""Check: a built model.onnx against its reference on the same weights and inputs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from halimede_engine import engine, session
from halimede_engine.session import file_bytes
from halimede_ops import image, text, vectors
from halimede_ops.spec import ModelSpec
from halimede_tools.build import describe, model_config
from halimede_tools.build.describe import Reading


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
IMAGE_BARS = BARS | {"int8": dataclasses.replace(BARS["int8"], mean_cosine=0.99)}
"""The bars of a vision tower."""
TOOLS = ("torch", "sentence-transformers", "optimum-onnx", "onnx", "onnxruntime-openvino", "nncf")


def reference(source: Path, texts: Sequence[str], reading: Reading) -> np.ndarray:
    """sentence-transformers' embeddings of the texts: `[len(texts), dims]` float32."""
    model = describe.load(source, reading)
    return np.asarray(model.encode(list(texts), batch_size=32, show_progress_bar=False))


Rows = engine.MakeRows
"""What makes a model's rows of its inputs."""


def text_rows(tokenizer_folder: Path, spec: ModelSpec) -> Rows:
    """What makes token rows of texts."""
    tokenizer = text.load(tokenizer_folder, spec)
    make_rows = engine.text_rows(tokenizer)
    return lambda texts: make_rows(tokenizer.prompted(texts, [None] * len(texts)))


def image_rows(_: Path, spec: ModelSpec) -> Rows:
    """What makes rows of encoded pictures."""
    images = spec.images()
    make_rows = engine.image_rows(images)
    return lambda files: make_rows(
        [image.prepare(file, images, row).pixels for row, file in enumerate(files)]
    )


def image_reference(source: Path, files: Sequence[bytes], reading: Reading) -> np.ndarray:
    """The image features that transformers gives: `[len(files), dims]` float32, L2 norm 1."""
    import torch
    from transformers.image_utils import load_image

    model = describe.load(source, reading)[0].auto_model.eval()
    processor = describe.image_processor(source, reading.name)
    features = []
    for file in files:
        seen = load_image(Image.open(io.BytesIO(file)))
        # Told where the channels are: it takes pictures 3 pixels high for channels first.
        given = processor(seen, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            features.append(model.get_image_features(**given).numpy())
    return vectors.normalise(np.concatenate(features))


@dataclasses.dataclass(frozen=True)
class Tower:
    """One way into a model: its texts, or a CLIP's images. Both are built and checked alike."""

    inputs: str
    """What goes in: `texts` or `images`."""
    bars: Mapping[str, Bar]
    """Precision → what it must reach."""
    rows: Callable[[Path, ModelSpec], Rows]
    """What makes the rows that the graph in this folder takes."""
    reference: Callable[[Path, Sequence[Any], Reading], np.ndarray]
    """The vectors that the model in this folder must give: `[inputs, dims]` float32."""


TEXTS = Tower("texts", BARS, text_rows, reference)
IMAGES = Tower("images", IMAGE_BARS, image_rows, image_reference)


class Engine(engine.Engine):
    """A model with the accelerators of the served configs, and one stream for each core."""

    def __init__(self, model: Path, rows: Rows, spec: ModelSpec) -> None:
        cores = len(os.sched_getaffinity(0))
        accelerators = [session.Accelerator(name) for name in model_config.CPU_ACCELERATORS]
        opened, _ = session.open_session(
            model, accelerators, cores, streams=cores, max_tokens=spec.max_tokens
        )
        super().__init__(opened, rows, spec)


def check(
    precision: str,
    model: Path,
    fp32: Path,
    engine: Engine,
    tower: Tower,
    inputs: Sequence[Any],
    expected: np.ndarray,
) -> dict[str, Any]:
    """The quality record of one built file: cosines, invariance, size, tools, missed bars."""
    bar = tower.bars[precision]
    together = engine.embed(inputs)
    cosines = vectors.cosine(together, expected)
    size_bytes, fp32_bytes = file_bytes(model), file_bytes(fp32)
    record: dict[str, Any] = {
        "model": engine.spec.name,
        "precision": precision,
        "space": engine.spec.space,
        tower.inputs: len(inputs),
        "mean_cosine": round(float(cosines.mean()), 6),
        "min_cosine": round(float(cosines.min()), 6),
        "invariance": round(_invariance(engine, inputs, together), 6),
        "size_bytes": size_bytes,
        "size_ratio": round(size_bytes / fp32_bytes, 4),
        "bar": dataclasses.asdict(bar),
        "tools": {name: importlib.metadata.version(name) for name in TOOLS},
    }
    return record | {"missed": missed(record, bar)}


def _invariance(engine: Engine, inputs: Sequence[Any], together: np.ndarray) -> float:
    """Lowest cosine between each input sorted among all, alone, and in a small random batch, where
    a text is padded to a neighbour's length.
    """
    rows = engine.rows(inputs)
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
