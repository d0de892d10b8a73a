"""Windows: local attention in overlapping windows, in operations that a graph of every shape has.

Longformer and its relatives make the windows with `as_strided`, whose sizes ONNX takes from the
text that was traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """While the model is traced, let `as_strided` make overlapping windows of blocks."""
    with mock.patch.object(torch.Tensor, "as_strided", _windows):
        yield


def _windows(
    tensor: torch.Tensor, size: Sequence[Any], stride: Sequence[int], *_: Any, **__: Any
) -> torch.Tensor:
    """Windows `[rows, windows, window, width]` of `[rows, tokens, width]`, where each begins one
    step behind the one before, and a window is a multiple of the step.
    """
    width, window, step = tensor.shape[-1], int(size[-2]), int(stride[1] // stride[2])
    if len(size) != 4 or window % step:
        raise NotImplementedError("as_strided makes something else than overlapping windows")
    blocks = tensor.reshape(tensor.shape[0], -1, step, width)
    parts = window // step
    count = blocks.shape[1] - parts + 1
    return torch.cat([blocks[:, part : part + count] for part in range(parts)], dim=2)
