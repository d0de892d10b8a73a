"""Triton backend `image`: IMAGE, an encoded picture, to pixels, WIDTH, HEIGHT and FORMAT."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from adapter import metrics, triton
from halimede_ops import image, spec
from halimede_ops.errors import HalimedeError


class TritonPythonModel:
    """One instance of an image model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the model's vision tower takes, and start the threads."""
        config = triton.ModelConfig(args)
        taken = triton.load(lambda: spec.load(config.version_folder).images())
        self.reader = image.Reader(taken, threads=len(os.sched_getaffinity(0)))
        self.metrics = metrics.Metrics(config)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Prepare the pictures of all requests together."""
        return triton.answer(requests, _read, self._prepare, _write, self.metrics.failed)

    def finalize(self) -> None:
        """End the threads."""
        self.reader.close()
        self.metrics.close()

    def _prepare(self, requests: list[list[bytes]]) -> list[list[image.Picture] | HalimedeError]:
        begun = [self.reader.read(request) for request in requests]
        return [triton.attempt(list, pictures) for pictures in begun]


def _read(request: Any) -> list[bytes]:
    return list(triton.tensor(request, "IMAGE").reshape(-1))


def _write(pictures: list[image.Picture]) -> list[Any]:
    return [
        triton.output(spec.PIXELS, np.stack([picture.pixels for picture in pictures])),
        triton.output("WIDTH", _column([picture.width for picture in pictures], np.int32)),
        triton.output("HEIGHT", _column([picture.height for picture in pictures], np.int32)),
        triton.output("FORMAT", _column([picture.format.encode() for picture in pictures], object)),
    ]


def _column(values: Sequence[Any], dtype: Any) -> np.ndarray:
    """`[len(values), 1]`."""
    return np.array(values, dtype).reshape(-1, 1)
