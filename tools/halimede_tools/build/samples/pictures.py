"""Pictures that the build calibrates INT8 with, and pictures that it checks vectors with.

They are drawn: gradients, shapes, strokes and noise by seeded random choice, the same pictures on
every machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from halimede_ops.errors import InvalidInput

SIZES = (
    (320, 240), (240, 320), (224, 224), (500, 333), (97, 61), (64, 200), (640, 360), (225, 223),
    (1, 1), (1, 130), (130, 1), (3, 3), (2, 90), (600, 9), (31, 31), (448, 224),
)  # fmt: skip
"""Width and height: ordinary ones, one pixel, one pixel wide or high, extreme ratios."""


LEAST_PICTURES = 50
"""Fewest pictures to calibrate INT8 on."""


class Form(NamedTuple):
    """One way of storing a picture."""

    format: str
    """Pillow's name of the file format."""
    mode: str
    """Pillow's name of how colours are stored."""
    options: Mapping[str, object] = {}
    orientation: int = 1
    """EXIF orientation, 1 to 8."""


FORMS = (
    Form("JPEG", "RGB"),
    Form("PNG", "RGB"),
    Form("WEBP", "RGB", {"quality": 80}),
    Form("JPEG", "L"),
    Form("JPEG", "CMYK"),
    Form("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    *[Form("JPEG", "RGB", orientation=orientation) for orientation in range(2, 9)],
    Form("PNG", "RGB", orientation=6),
    Form("WEBP", "RGB", {"lossless": True}, orientation=8),
    Form("PNG", "RGBA"),
    Form("PNG", "LA"),
    Form("PNG", "L"),
    Form("PNG", "P"),
    Form("PNG", "P", {"transparency": 3}),
    Form("PNG", "1"),
    Form("PNG", "I;16"),
    Form("WEBP", "RGBA"),
    Form("GIF", "P"),
    Form("GIF", "P", {"transparency": 0}),
    Form("GIF", "L"),
    Form("BMP", "RGB"),
    Form("BMP", "L"),
    Form("BMP", "P"),
    Form("BMP", "1"),
    Form("TIFF", "RGB", {"compression": "tiff_lzw"}),
    Form("TIFF", "RGBA"),
    Form("TIFF", "CMYK"),
    Form("TIFF", "L", {"compression": "tiff_deflate"}),
    Form("TIFF", "LAB"),
    Form("TIFF", "I;16"),
    Form("TIFF", "I"),
    Form("TIFF", "F"),
    Form("TIFF", "RGB", {"compression": "jpeg"}, orientation=3),
)
"""Every format with the modes that it can store."""


def drawn(seed: int, width: int, height: int) -> Image.Image:
    """An RGB picture of this size."""
    chance = np.random.default_rng(seed)
    corners = chance.integers(0, 256, (2, 2, 3), np.uint8)
    picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(chance.integers(2, 12))):
        colour = tuple(int(value) for value in chance.integers(0, 256, 3))
        left, right = sorted(int(value) for value in chance.integers(0, width + 1, 2))
        top, bottom = sorted(int(value) for value in chance.integers(0, height + 1, 2))
        shape = (draw.ellipse, draw.rectangle, draw.line)[int(chance.integers(3))]
        shape((left, top, right, bottom), fill=colour)
    if chance.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(float(chance.random() * 3)))
    noise = chance.normal(0, chance.random() * 24, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def encoded(picture: Image.Image, form: Form) -> bytes:
    """The file of a picture in this form."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = form.orientation
    turned = {"exif": exif} if form.orientation != 1 else {}
    in_mode(picture, form.mode).save(file, form.format, **form.options, **turned)
    return file.getvalue()


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """The picture with its colours stored in this mode, over the mode's own range."""
    if mode == "LAB":
        return Image.frombytes(mode, picture.size, picture.tobytes())
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(picture.convert("L"))
        if mode == "F":
            return Image.fromarray(grey.astype(np.float32) * np.float32(1.1))
        wide = grey.astype(np.uint16) * 257
        return Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
    return picture.convert(mode)


def check_pictures(count: int = 264) -> list[bytes]:
    """Files to compare pixels and vectors on: every form, over all sizes in turn."""
    return list(islice(_files(seed=2), count))


def calibration(folder: Path | None) -> list[bytes]:
    """The files of the user's folder, in order of name, else the built-in calibration pictures.

    Raises:
        InvalidInput: it is no folder, or has too few files.
    """
    if folder is None:
        return calibration_pictures()
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if len(files) < LEAST_PICTURES:
        raise InvalidInput(
            f"the folder of calibration images has {len(files)} files; give {LEAST_PICTURES} "
            "pictures or more, and nothing else. Ranges of fewer do not hold for others."
        )
    return [path.read_bytes() for path in files]


def calibration_pictures(count: int = 100) -> list[bytes]:
    """Files to take activation ranges from; none of them is a check picture."""
    return [
        encoded(drawn(10_000 + seed, *SIZES[seed % 8]), FORMS[seed % 3]) for seed in range(count)
    ]


def _files(seed: int) -> Iterator[bytes]:
    # 36 forms and 16 sizes: one more step each round, so that each form gets each size.
    sizes = cycle(SIZES)
    while True:
        for form in FORMS:
            yield encoded(drawn(seed, *next(sizes)), form)
            seed += 1
        next(sizes)
