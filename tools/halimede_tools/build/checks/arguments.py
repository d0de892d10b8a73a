"""Arguments of a build, checked before any work."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from halimede.config.folders import REPOSITORY, writing
from halimede_ops.errors import BuildError, InvalidInput
from halimede_repository import names
from halimede_tools.build import candidates
from halimede_tools.build.samples import corpus, pictures, sts


def check(
    name: str,
    repository: Path,
    *,
    candidate: bool,
    alias: bool,
    calibration: Path | None,
    calibration_images: Path | None,
    sts_file: Path | None,
) -> None:
    """Raise unless the files of a build can be read, and its model can be written.

    Raises:
        InvalidInput: a file cannot be read or has too little, or the name would share folders with
            another model.
        DeployError: there is nothing that a candidate could follow.
        BuildError: the repository cannot be written.
    """
    names.check_unshared(name, repository)
    if candidate and alias:
        raise InvalidInput(
            "a candidate has no aliases: those of the model follow it. Leave out --alias."
        )
    if candidate:
        candidates.check_served(name, repository)
    if calibration is not None:
        corpus.calibration(calibration)
    if calibration_images is not None:
        _check_pictures(pictures.calibration(calibration_images))
    if sts_file is not None:
        sts.sentences(sts_file)
    check_writable(repository)


def check_writable(repository: Path) -> None:
    """Raise unless files can be written to the repository.

    Raises:
        BuildError: they cannot.
    """
    with writing(repository, REPOSITORY, BuildError):
        repository.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=repository):
            pass


def _check_pictures(files: list[bytes]) -> None:
    for index, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file)) as picture:
                picture.verify()
        except Exception:  # Pillow's formats each raise their own
            raise InvalidInput(
                f"file {index} of the folder of calibration images, in order of name, is no "
                "picture that can be read; give pictures alone."
            ) from None
