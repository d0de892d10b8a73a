"""Images from paths, URLs, bytes and PIL images.

Each image is loaded when it is read. A PIL image is encoded as PNG with its EXIF orientation,
which is lossless. Modes that PNG does not have (CMYK, YCbCr, 32-bit) become RGB, which is what
models see.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from halimede.inputs.content import LazyInput, Pair, ReadOptions
from halimede.inputs.texts import SINGLE, encode_text, refuse_async, stream_of
from halimede_ops.errors import ImageTooLarge, InvalidImage, InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | PilImage | LazyInput"
"""An image: a path or URL, the bytes of a file, a PIL image, or an image of `find_images`."""

BYTES = (bytes, bytearray, memoryview)
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
PNG_MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
EXIF_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class ImageBytes:
    """An image in memory."""

    data: bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory."""
        return len(self.data)

    def read(self, options: ReadOptions) -> bytes:
        """Return the encoded image.

        Raises:
            ImageTooLarge: it has more bytes than `options` allows.
        """
        check_size(len(self.data), options.max_bytes)
        return self.data


@dataclasses.dataclass(frozen=True)
class LazyImage:
    """An image that is loaded when it is read."""

    load: Callable[[ReadOptions], bytes]
    memory_bytes = 0

    def read(self, options: ReadOptions) -> bytes:
        """Return the encoded image.

        Raises:
            InvalidInput: it cannot be loaded, or has more bytes than `options` allows.
        """
        data = self.load(options)
        check_size(len(data), options.max_bytes)
        return data


@dataclasses.dataclass(frozen=True)
class LazyPair:
    """A text and an image that is loaded when it is read. Either may be None."""

    text: bytes | None
    image: LazyInput | None

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory before the image is read."""
        image_bytes = 0 if self.image is None else self.image.memory_bytes
        return image_bytes + len(self.text or b"")

    def read(self, options: ReadOptions) -> Pair:
        """Return the text with the encoded image.

        Raises:
            InvalidInput: the image cannot be loaded, or is too large.
        """
        image = None if self.image is None else self.image.read(options)
        assert image is None or isinstance(image, bytes)
        return Pair(self.text, image)


def image_inputs(images: Iterable[ImageLike] | ImageLike) -> list[LazyInput]:
    """Convert images to inputs. A single image becomes a list of one.

    Raises:
        InvalidInput: `images` is no image and no iterable with an order.
    """
    if isinstance(images, (*SINGLE, LazyInput)) or is_pil_image(images):
        return [image_input(images)]
    return [image_input(image) for image in _listed(images, "images")]


def is_pil_image(value: object) -> bool:
    """Whether a value is a PIL image. Does not import PIL."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def pair_inputs(
    texts: Sequence[str | None] | None, images: Sequence[ImageLike | None] | None
) -> list[LazyInput]:
    """Convert texts, and the images at the same indices, to inputs.

    Raises:
        InvalidInput: their numbers differ, or both are None at an index.
        InvalidText: a text is not a string, or has a lone surrogate.
    """
    if texts is None and images is None:
        raise InvalidInput("neither texts nor images are given. Give one, or both.")
    texts = None if texts is None else _listed(texts, "texts")
    images = None if images is None else _listed(images, "images")
    if texts is None:
        texts = [None] * len(images or ())
    if images is None:
        images = [None] * len(texts)
    if len(texts) != len(images):
        raise InvalidInput(
            f"{len(texts)} texts and {len(images)} images are given. Give as many of both, with "
            "None where one is missing."
        )
    return [_pair_input(index, texts[index], images[index]) for index in range(len(texts))]


def image_input(image: Any) -> LazyInput:
    """Convert an image to an input. An object of any other type fails when it is read."""
    if isinstance(image, BYTES):
        return ImageBytes(bytes(image))
    if isinstance(image, str) and URL.match(image):
        return image_at_url(image)
    if isinstance(image, (str, os.PathLike)):
        return image_in_file(Path(image))
    if is_pil_image(image):
        # The image must not change until it is embedded.
        return LazyImage(lambda _: encode(image))
    if isinstance(image, LazyInput):
        return image
    return unreadable_image(
        InvalidImage(f"it is {type(image).__name__}; give a path, a URL, bytes or a PIL image.")
    )


def image_at_url(url: str) -> LazyImage:
    """Return the image at a URL, to be fetched when it is read."""
    return LazyImage(lambda options: options.fetch(url, options.max_bytes))


def image_in_file(path: Path) -> LazyImage:
    """Return the image in a file, to be loaded when it is read."""
    return LazyImage(lambda options: _read_file(path, options.max_bytes))


def unreadable_image(error: InvalidInput) -> LazyImage:
    """Return an image that raises this error when it is read."""

    def fail(_: ReadOptions) -> bytes:
        raise error

    return LazyImage(fail)


def encode(picture: Any) -> bytes:
    """Encode a PIL image as PNG, with its EXIF orientation.

    Raises:
        InvalidImage: it has no pixels, its mode cannot become RGB, or its file is damaged.
    """
    out = io.BytesIO()
    try:
        exif = picture.getexif()
        orientation = type(exif)()
        orientation[EXIF_ORIENTATION] = exif.get(EXIF_ORIENTATION, 1)
        converted = picture if picture.mode in PNG_MODES else picture.convert("RGB")
        converted.save(out, "PNG", compress_level=1, exif=orientation)
    except (OSError, ValueError, SyntaxError, SystemError) as error:  # PIL reads the file here
        raise InvalidImage(
            f"the PIL image of mode {picture.mode} and size {picture.size} cannot be encoded "
            f"({type(error).__name__})."
        ) from None
    return out.getvalue()


def check_size(size_bytes: int, max_bytes: int) -> None:
    """Raise ImageTooLarge if an image of `size_bytes` exceeds `max_bytes`."""
    if size_bytes > max_bytes:
        raise ImageTooLarge(
            f"the image has {size_bytes:,} bytes; at most {max_bytes:,} are allowed. Scale it down."
        )


def _listed(values: Any, name: str) -> list[Any]:
    """The elements of the argument `name`."""
    refuse_async(stream_of(values, name), name)
    return list(values)


def _pair_input(index: int, text: str | None, image: ImageLike | None) -> LazyPair:
    if text is None and image is None:
        raise InvalidInput(
            "has neither a text nor an image. Give one, or both.", subject="pair", index=index
        )
    return LazyPair(
        None if text is None else encode_text(text, index),
        None if image is None else image_input(image),
    )


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImage("it is not a file.")
        check_size(status.st_size, max_bytes)
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidImage(f"the file cannot be read: {error.strerror}.") from None
