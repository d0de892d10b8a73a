"""Encoded images to pixels: decode, orient, resize, crop.

The pixels equal those of transformers. `transformers.image_utils.load_image` opens an image: it
applies the EXIF orientation, converts to RGB, drops transparency and takes the first frame or page.
`CLIPImageProcessor` resizes and crops it. Both call Pillow; this module makes the same calls in the
same order.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from halimede_ops.errors import ImageTooLarge, InvalidImage, OutOfMemory
from halimede_ops.spec import ImageSpec

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded, by Pillow's names. Pillow's other decoders are never tried."""
COMMON_NAMES = {"MPO": "JPEG"}
"""Pillow's name → the format's common name. MPO is a phone's JPEG that holds a second image."""


class PreparedImage(NamedTuple):
    """One image, ready for the vision tower."""

    pixels: np.ndarray
    """`[3, height, width]` uint8 in RGB order, resized and cropped to the model's input."""
    width: int
    """Width of the original image after EXIF orientation, in pixels."""
    height: int
    """Height of the original image after EXIF orientation, in pixels."""
    format: str
    """One of FORMATS."""


def prepare(data: bytes, spec: ImageSpec, row: int = 0) -> PreparedImage:
    """Decode, orient, resize and crop one encoded image; `row` is its number in error messages.

    Raises:
        InvalidImage: the image has an unknown format, or is damaged, animated or empty.
        ImageTooLarge: the image has more bytes or pixels than `spec` allows.
        OutOfMemory: the process has not enough memory to decode the image.
    """
    with open_image(data, spec, row) as image:
        return prepare_opened(image, spec, row)


@contextmanager
def open_image(data: bytes, spec: ImageSpec, row: int) -> Iterator[Image.Image]:
    """Open an encoded image and check its header. The pixels are not decoded yet.

    Raises:
        InvalidImage: the image has an unknown format, or is damaged, animated or empty.
        ImageTooLarge: the image has more bytes or pixels than `spec` allows.
    """
    if len(data) > spec.max_image_bytes:
        raise ImageTooLarge(
            f"has {len(data):,} bytes; the limit is {spec.max_image_bytes:,}. "
            "Send a smaller or more compressed image.",
            subject="image",
            index=row,
        )
    with _translate_errors(spec, row):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    with image:
        _check(image, spec, row)
        yield image


def prepare_opened(image: Image.Image, spec: ImageSpec, row: int) -> PreparedImage:
    """Decode, orient, resize and crop an image from `open_image`.

    Raises:
        InvalidImage: the image is damaged.
        OutOfMemory: the process has not enough memory to decode the image.
    """
    name = str(image.format)
    with _translate_errors(spec, row):
        ImageOps.exif_transpose(image, in_place=True)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return PreparedImage(
            _pixels(rgb, spec), rgb.width, rgb.height, COMMON_NAMES.get(name, name)
        )


def decoded_pixels(image: Image.Image, spec: ImageSpec) -> int:
    """The larger pixel count of an opened image: before or after resizing."""
    width, height = resized_size(image.width, image.height, spec)
    return max(image.width * image.height, width * height)


def resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Width and height in pixels after resizing, as CLIPImageProcessor computes them."""
    if not spec.resize:
        return width, height
    if len(spec.resize) == 2:
        return spec.resize[1], spec.resize[0]
    edge = spec.resize[0]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _pixels(rgb: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resize and crop an RGB image: `[3, height, width]` uint8."""
    size = resized_size(rgb.width, rgb.height, spec)
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling(spec.resample))
    # CLIPImageProcessor pads a too small image with black; so does `crop` beyond the edges.
    left, top = (rgb.width - spec.width) // 2, (rgb.height - spec.height) // 2
    cropped = rgb.crop((left, top, left + spec.width, top + spec.height))
    return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))


def _check(image: Image.Image, spec: ImageSpec, row: int) -> None:
    if image.width < 1 or image.height < 1:
        raise InvalidImage(
            f"is {image.width} x {image.height} pixels: it is empty.", subject="image", index=row
        )
    if image.format == "WEBP" and getattr(image, "is_animated", False):
        raise InvalidImage(
            "is an animated WebP. Send one of its frames.", subject="image", index=row
        )
    if decoded_pixels(image, spec) > spec.max_image_pixels:
        width, height = resized_size(image.width, image.height, spec)
        raise ImageTooLarge(
            f"is {image.width} x {image.height} pixels, and {width} x {height} when "
            f"resized for the model; the limit is {spec.max_image_pixels:,} pixels. "
            "Send a smaller image, or a part of it.",
            subject="image",
            index=row,
        )


@contextmanager
def _translate_errors(spec: ImageSpec, row: int) -> Iterator[None]:
    """Translate Pillow's exceptions. A damaged file can raise almost any of them."""
    try:
        yield
    except UnidentifiedImageError:
        raise InvalidImage(
            f"is none of {', '.join(FORMATS)}, or damaged.", subject="image", index=row
        ) from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(
            f"has far more than the {spec.max_image_pixels:,} pixels that are allowed. "
            "Send a smaller image, or a part of it.",
            subject="image",
            index=row,
        ) from None
    except MemoryError:
        raise OutOfMemory(f"no memory to decode image {row} now. Send it again later.") from None
    except Exception as error:
        raise InvalidImage(
            f"is damaged ({type(error).__name__}). Send the whole file, undamaged.",
            subject="image",
            index=row,
        ) from None
