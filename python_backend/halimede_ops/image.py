"""Encoded pictures to pixels: decode, orient, resize, crop.

A picture is seen as transformers sees it: `transformers.image_utils.load_image` opens it (EXIF
orientation applied, then RGB: transparency dropped, the first frame or page taken), and
`CLIPImageProcessor` resizes and crops it. Both call Pillow, and so do we, in the same order, so
that every pixel is equal.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from halimede_ops import memory
from halimede_ops.errors import ImageTooLarge, InvalidImage, OutOfMemory
from halimede_ops.spec import ImageSpec

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, by Pillow's names; its other decoders are never tried."""
NAMES = {"MPO": "JPEG"}
"""Pillow's names of what users know by another: a phone's JPEG with a second picture inside."""


LARGE_PIXELS = 4_000_000
"""Pictures above this are freed at once: giving memory back takes a fraction of their decoding."""


class Picture(NamedTuple):
    """One picture, ready for the vision tower."""

    pixels: np.ndarray
    """`[3, height, width]` uint8, red first, resized and cropped as the model wants it."""
    width: int
    """Of the picture as it is seen, after its EXIF orientation, in pixels."""
    height: int
    format: str
    """One of FORMATS."""


class Reader:
    """Threads that prepare pictures for one model, with bounded memory. Safe to share."""

    def __init__(self, spec: ImageSpec, threads: int) -> None:
        self._spec = spec
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="halimede-image")
        self._room = _Room(spec.max_image_pixels)

    def read(self, images: Sequence[bytes]) -> Iterator[Picture]:
        """Each encoded picture prepared, in order; begun at once.

        Pillow decodes and resizes without Python's lock, so pictures are prepared in parallel. No
        more than `max_image_pixels` are held decoded at a time.

        Raises:
            HalimedeError: as `prepare`, when the turn of a bad one comes; what is not begun yet is
                given up.
        """
        return self._threads.map(self._read, images, range(len(images)))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _read(self, data: bytes, row: int) -> Picture:
        with opened(data, self._spec, row) as image:
            pixels = decoded(image, self._spec)
            with self._room.taken(pixels), _freed(pixels), closing(image):
                return prepared(image, self._spec, row)


def prepare(data: bytes, spec: ImageSpec, row: int = 0) -> Picture:
    """One encoded picture, decoded, oriented, resized and cropped.

    Raises:
        InvalidImage: it is of no known format, damaged, animated or empty.
        ImageTooLarge: it has more bytes or pixels than `spec` allows.
        OutOfMemory: there was no memory to decode it.
    """
    with opened(data, spec, row) as image:
        return prepared(image, spec, row)


@contextmanager
def opened(data: bytes, spec: ImageSpec, row: int) -> Iterator[Image.Image]:
    """The picture with its header read and its size allowed, not decoded yet.

    Raises:
        InvalidImage: it is of no known format, damaged, animated or empty.
        ImageTooLarge: it has more bytes or pixels than `spec` allows.
    """
    if len(data) > spec.max_image_bytes:
        raise ImageTooLarge(
            f"has {len(data):,} bytes; at most {spec.max_image_bytes:,} are taken. "
            "Send it smaller or compressed more.",
            subject="image",
            index=row,
        )
    with _errors_named(spec, row):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    with image:
        _check(image, spec, row)
        yield image


def prepared(image: Image.Image, spec: ImageSpec, row: int) -> Picture:
    """The opened picture, decoded, oriented, resized and cropped.

    Raises:
        InvalidImage: it is damaged.
        OutOfMemory: there was no memory to decode it.
    """
    name = str(image.format)
    with _errors_named(spec, row):
        ImageOps.exif_transpose(image, in_place=True)
        seen = image if image.mode == "RGB" else image.convert("RGB")
        return Picture(_pixels(seen, spec), seen.width, seen.height, NAMES.get(name, name))


def decoded(image: Image.Image, spec: ImageSpec) -> int:
    """Pixels that an opened picture takes in memory: its own, or those that resizing gives."""
    width, height = resized(image.width, image.height, spec)
    return max(image.width * image.height, width * height)


def resized(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Width and height that a picture of this size is resized to, as CLIPImageProcessor does."""
    if not spec.resize:
        return width, height
    if len(spec.resize) == 2:
        return spec.resize[1], spec.resize[0]
    edge = spec.resize[0]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _pixels(seen: Image.Image, spec: ImageSpec) -> np.ndarray:
    """`[3, height, width]` uint8 of an RGB picture."""
    size = resized(seen.width, seen.height, spec)
    if size != seen.size:
        seen = seen.resize(size, Image.Resampling(spec.resample))
    # Beyond its edges a picture is black, as CLIPImageProcessor pads what is too small.
    left, top = (seen.width - spec.width) // 2, (seen.height - spec.height) // 2
    cropped = seen.crop((left, top, left + spec.width, top + spec.height))
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
    if decoded(image, spec) > spec.max_image_pixels:
        width, height = resized(image.width, image.height, spec)
        raise ImageTooLarge(
            f"is {image.width} x {image.height} pixels, and {width} x {height} when "
            f"resized for the model; at most {spec.max_image_pixels:,} are taken. "
            "Send it smaller, or a part of it.",
            subject="image",
            index=row,
        )


@contextmanager
def _errors_named(spec: ImageSpec, row: int) -> Iterator[None]:
    """What Pillow raises as ours. Damaged files make it raise nearly anything."""
    try:
        yield
    except UnidentifiedImageError:
        raise InvalidImage(
            f"is none of {', '.join(FORMATS)}, or damaged.", subject="image", index=row
        ) from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(
            f"has far more than the {spec.max_image_pixels:,} pixels that are taken. "
            "Send it smaller, or a part of it.",
            subject="image",
            index=row,
        ) from None
    except MemoryError:
        raise OutOfMemory(f"no memory to decode image {row} now.") from None
    except Exception as error:
        raise InvalidImage(
            f"is damaged ({type(error).__name__}). Send the whole file, undamaged.",
            subject="image",
            index=row,
        ) from None


@contextmanager
def _freed(pixels: int) -> Iterator[None]:
    """Leave no memory of a large picture behind."""
    try:
        yield
    finally:
        if pixels > LARGE_PIXELS:
            memory.give_back()


class _Room:
    """A number of pixels that may be held at a time."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for so many pixels, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._free)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
