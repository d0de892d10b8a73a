"""How the vectors of two models become one: what `fuse` multiplies with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halimede_ops.errors import InvalidModel

FILE_NAME = "fusion.npz"
ARRAYS = ("text_mean", "image_mean", "text_projection", "image_projection")


class Fusion(NamedTuple):
    """A projection of two models' vectors, side by side, to one space."""

    text_model: str
    """Model that embeds texts, by the name it is served under."""
    image_model: str
    """Model that embeds images."""
    text_mean: np.ndarray
    """`[text dims]` float32, subtracted from a text's vector."""
    image_mean: np.ndarray
    """`[image dims]` float32."""
    text_projection: np.ndarray
    """`[text dims, dims]` float32; holds the text's weight."""
    image_projection: np.ndarray
    """`[image dims, dims]` float32; holds the image's weight."""

    @property
    def dims(self) -> int:
        """Length of a fused vector."""
        return self.text_projection.shape[1]


def load(folder: Path) -> Fusion:
    """Fusion from `fusion.npz` in a version folder of the repository.

    Raises:
        InvalidModel: the file is missing or not a fusion.
    """
    try:
        with np.load(folder / FILE_NAME, allow_pickle=False) as found:
            names: dict[str, Any] = json.loads(str(found["models"]))
            return Fusion(**names, **{name: found[name] for name in ARRAYS})
    except Exception as error:  # numpy and zipfile each raise their own
        raise InvalidModel(
            f"{FILE_NAME} cannot be read ({type(error).__name__}); make the fusion again"
        ) from error


def save(fusion: Fusion, folder: Path) -> None:
    """Write `fusion.npz`; equal fusions give equal bytes."""
    names = {"text_model": fusion.text_model, "image_model": fusion.image_model}
    arrays = {name: getattr(fusion, name) for name in ARRAYS}
    np.savez(folder / FILE_NAME, models=np.array(json.dumps(names)), **arrays)
