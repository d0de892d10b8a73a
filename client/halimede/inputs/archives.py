"""Images in folders and in zip and tar archives."""

from __future__ import annotations

import dataclasses
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from halimede.inputs.content import Content, LazyInput, ReadOptions
from halimede.inputs.images import (
    URL,
    ImageBytes,
    check_size,
    image_at_url,
    image_in_file,
    unreadable_image,
)
from halimede_ops.errors import ImageTooLarge, InvalidImage, InvalidInput

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
)
"""Suffixes of images in folders and archives. Other files are skipped."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_MEMBER_BYTES = 64 * 2**20
"""Largest image of an archive that is loaded. The model's own limit is checked when it is read."""
MAX_HEADER_BYTES = 64 * 1024
"""Longest tar header of a name or attributes. tarfile holds it in memory, whatever its size."""
HEADER_TYPES = frozenset(
    (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    )
)
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,  # a compression that Python does not have
    RuntimeError,  # encrypted
)
"""What zipfile and tarfile raise for invalid archives."""


@dataclasses.dataclass(frozen=True)
class NamedImage:
    """An image of a folder or an archive, with its name."""

    name: str
    """Path in the folder or archive; the name of a single file; the URL."""
    source: LazyInput

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory before the image is read."""
        return self.source.memory_bytes

    def read(self, options: ReadOptions) -> Content:
        """Return the encoded image.

        Raises:
            InvalidInput: it cannot be read, or is too large.
        """
        return self.source.read(options)


def find_images(location: Path | str) -> Iterator[NamedImage]:
    """Iterate over the images of a folder or of a zip or tar archive, or yield the one image of a
    file or URL.

    A folder is sorted by name. An archive keeps its own order, and each image is loaded as the
    iteration reaches it. Hidden files, links, and files without the suffix of an image are skipped.

    Raises:
        InvalidInput: there is nothing at the path.
    """
    path = Path(location)
    if isinstance(location, str) and URL.match(location):
        yield NamedImage(location, image_at_url(location))
    elif path.is_dir():
        yield from _images_in_folder(path)
    elif not path.is_file():
        raise InvalidInput("there is no such file or folder of images.")
    elif path.name.lower().endswith(".zip"):
        yield from _images_in_zip(path)
    elif path.name.lower().endswith(TAR_SUFFIXES):
        yield from _images_in_tar(path)
    else:
        yield NamedImage(path.name, image_in_file(path))


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image and is not hidden."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _images_in_folder(folder: Path) -> Iterator[NamedImage]:
    for parent, subfolders, files in os.walk(folder):
        subfolders.sort()
        for name in sorted(filter(is_image, files)):
            path = Path(parent) / name
            if not path.is_symlink():
                yield NamedImage(str(path.relative_to(folder)), image_in_file(path))


def _images_in_zip(path: Path) -> Iterator[NamedImage]:
    try:
        archive = zipfile.ZipFile(path)
    except ARCHIVE_ERRORS:
        raise InvalidInput("the archive cannot be read: it is damaged.") from None
    with archive:
        for member in archive.infolist():
            if is_image(member.filename) and not member.is_dir():
                image = _load_member(member.file_size, archive.open, member)
                yield NamedImage(member.filename, image)


def _images_in_tar(path: Path) -> Iterator[NamedImage]:
    """Iterate over a tar once, from its beginning to its end."""
    try:
        with tarfile.open(path, "r|*", tarinfo=_BoundedHeader) as archive:
            for member in archive:
                if is_image(member.name) and member.isfile():
                    image = _load_member(member.size, archive.extractfile, member)
                    yield NamedImage(member.name, image)
                # tarfile keeps every header otherwise.
                archive.members = []  # type: ignore[attr-defined]
    except ARCHIVE_ERRORS:
        error = InvalidImage("the rest of the archive is damaged.")
        yield NamedImage(path.name, unreadable_image(error))


class _BoundedHeader(tarfile.TarInfo):
    """A tar header of bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type in HEADER_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError("header")
        return header


def _load_member(
    size_bytes: int, open_member: Callable[[Any], IO[bytes] | None], member: Any
) -> LazyInput:
    """Load an image of an archive into memory."""
    try:
        check_size(size_bytes, MAX_MEMBER_BYTES)
        file = open_member(member)
        assert file is not None  # tarfile returns None for what is not a file
        with file:
            return ImageBytes(_read_exactly(file, size_bytes))
    except ImageTooLarge as error:
        return unreadable_image(error)
    except ARCHIVE_ERRORS:
        return unreadable_image(InvalidImage("it is damaged in its archive, or encrypted."))


def _read_exactly(file: IO[bytes], size_bytes: int) -> bytes:
    data = file.read(size_bytes)
    if len(data) < size_bytes:
        raise EOFError
    return data
