"""Triton backend `image`: encoded images (IMAGE) to PIXELS, WIDTH, HEIGHT and FORMAT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_engine import cores
from halimede_engine.image_reader import ImageReader
from halimede_ops import spec
from halimede_ops.errors import HalimedeError
from halimede_ops.image import PreparedImage


class TritonPythonModel:
    """One instance of an image model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preprocessing of the model's vision tower and start the threads."""
        config = triton.ModelConfig(args)
        image_spec = triton.load(lambda: spec.load(config.version_folder).images())
        self.reader = ImageReader(image_spec, threads=cores.available())
        self.metrics = metrics.Metrics(config)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Prepare the images of all requests in parallel."""
        return triton.answer(requests, _read, self._prepare, _write, self.metrics.count_error)

    def finalize(self) -> None:
        """Stop the threads."""
        self.reader.close()
        self.metrics.close()

    def _prepare(self, requests: list[list[bytes]]) -> list[list[PreparedImage] | HalimedeError]:
        started = [self.reader.read(request) for request in requests]
        return [triton.attempt(list, images) for images in started]


def _read(request: Any) -> list[bytes]:
    return list(triton.tensor(request, "IMAGE", 1).reshape(-1))


def _write(images: list[PreparedImage]) -> list[Any]:
    return [
        triton.output(spec.PIXELS, np.stack([image.pixels for image in images])),
        triton.output("WIDTH", _column([image.width for image in images], np.int32)),
        triton.output("HEIGHT", _column([image.height for image in images], np.int32)),
        triton.output("FORMAT", _column([image.format.encode() for image in images], object)),
    ]


def _column(values: Sequence[Any], dtype: Any) -> np.ndarray:
    """The values as a column, `[len(values), 1]`."""
    return np.array(values, dtype).reshape(-1, 1)
