"""Weights that are not finite: a model that has one is refused before it is exported.

The check's texts do not have every token, so vectors alone cannot show that the embedding of one
token is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from halimede_ops.errors import InvalidModel

SHOWN = 3
"""Tensors that an error names."""


def check_model(model: Any, name: str) -> None:
    """Raise unless every weight of a loaded PyTorch model is finite.

    Raises:
        InvalidModel: one is NaN or infinite.
    """
    # numpy has no bfloat16.
    _check(((key, tensor.float().numpy()) for key, tensor in model.state_dict().items()), name)


def check_graph(model: Any, name: str) -> None:
    """Raise unless every weight of an ONNX model is finite.

    Raises:
        InvalidModel: one is NaN or infinite.
    """
    from onnx import numpy_helper

    tensors = model.graph.initializer
    _check(((tensor.name, numpy_helper.to_array(tensor)) for tensor in tensors), name)


def _check(tensors: Iterable[tuple[str, np.ndarray]], name: str) -> None:
    damaged = [key for key, values in tensors if not _is_sound(values)]
    if damaged:
        more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        raise InvalidModel(
            f"{name} has weights that are NaN or infinite, in {', '.join(damaged[:SHOWN])}{more}: "
            "texts that use them would have no vector. Train or convert the model again."
        )


def _is_sound(values: np.ndarray) -> bool:
    """Whether all values are finite, or the tensor is a mask: 0 and -infinity alone."""
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return True
    return bool(np.isin(values, (0, -np.inf)).all())
