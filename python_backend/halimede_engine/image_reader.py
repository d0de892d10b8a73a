"""Prepares images in parallel, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

from halimede_engine import memory
from halimede_ops import image
from halimede_ops.image import PreparedImage
from halimede_ops.spec import ImageSpec

LARGE_PIXELS = 4_000_000
"""The memory of an image with more pixels is returned at once: that takes a fraction of the time
of decoding it."""


class ImageReader:
    """A pool of threads that prepares images for one model. Safe to call from several threads."""

    def __init__(self, spec: ImageSpec, threads: int) -> None:
        self._spec = spec
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="halimede-image")
        self._budget = _PixelBudget(spec.max_image_pixels)

    def read(self, images: Sequence[bytes]) -> Iterator[PreparedImage]:
        """Prepare encoded images; yield them in order. Starts at once.

        Pillow decodes and resizes without Python's global lock, so images are prepared in
        parallel. All images that are decoded at the same time have at most `max_image_pixels`.

        Raises:
            HalimedeError: what `image.prepare` raises, when the iterator reaches the invalid
                image. Images that no thread has started are dropped.
        """
        rows = range(len(images))
        try:
            return self._threads.map(self.prepare, images, rows)
        except RuntimeError:  # the interpreter is shutting down: no pool starts work
            return map(self.prepare, images, rows)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def prepare(self, data: bytes, row: int = 0) -> PreparedImage:
        """Prepare one encoded image in the caller's thread. Errors call it number `row`.

        Raises:
            HalimedeError: as `halimede_ops.image.prepare`.
        """
        with image.open_image(data, self._spec, row) as opened:
            pixels = image.decoded_pixels(opened, self._spec)
            with self._budget.reserve(pixels), _trim_memory(pixels), closing(opened):
                return image.prepare_opened(opened, self._spec, row)


@contextmanager
def _trim_memory(pixels: int) -> Iterator[None]:
    """Return the memory of a large image to the operating system on exit."""
    try:
        yield
    finally:
        if pixels > LARGE_PIXELS:
            memory.trim()


class _PixelBudget:
    """The number of pixels that may be decoded at the same time."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` are free, and reserve them until exit."""
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._free)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
