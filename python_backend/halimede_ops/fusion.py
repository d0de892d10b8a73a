"""The projection that fuses the vectors of a text model and an image model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halimede_ops.errors import InvalidModel

FILE_NAME = "fusion.npz"
ARRAYS = ("text_mean", "image_mean", "text_projection", "image_projection")


class Fusion(NamedTuple):
    """A projection from the vectors of two models to one space: see `vectors.fuse`."""

    text_model: str
    """Served name of the model that embeds texts."""
    image_model: str
    """Served name of the model that embeds images."""
    text_mean: np.ndarray
    """`[text dims]` float32, subtracted from the text's vector."""
    image_mean: np.ndarray
    """`[image dims]` float32, subtracted from the image's vector."""
    text_projection: np.ndarray
    """`[text dims, dims]` float32; includes the weight of texts."""
    image_projection: np.ndarray
    """`[image dims, dims]` float32; includes the weight of images."""

    @property
    def dims(self) -> int:
        """Dimensions of a fused vector."""
        return self.text_projection.shape[1]


def load(folder: Path) -> Fusion:
    """Read `fusion.npz` from a version folder of the repository.

    Raises:
        InvalidModel: the file is missing or is no fusion.
    """
    try:
        with np.load(folder / FILE_NAME, allow_pickle=False) as arrays:
            names: dict[str, Any] = json.loads(str(arrays["models"]))
            return Fusion(**names, **{name: arrays[name] for name in ARRAYS})
    except Exception as error:  # numpy and zipfile raise many classes
        raise InvalidModel(
            f"{FILE_NAME} cannot be read ({type(error).__name__}); make the fusion again"
        ) from error


def save(fusion: Fusion, folder: Path) -> None:
    """Write `fusion.npz` to a folder. Equal fusions give equal bytes."""
    names = {"text_model": fusion.text_model, "image_model": fusion.image_model}
    arrays = {name: getattr(fusion, name) for name in ARRAYS}
    np.savez(folder / FILE_NAME, models=np.array(json.dumps(names)), **arrays)
