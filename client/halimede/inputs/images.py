"""Images as they are given: paths, urls, bytes, PIL images, and what folders and archives hold.

Each becomes a source that is read when its turn comes. A picture of PIL is encoded as PNG, with its
EXIF orientation, which loses nothing: a mode that PNG does not have (CMYK, YCbCr, 32-bit) becomes
RGB, as the model sees every picture.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import lzma
import os
import re
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from halimede.inputs.items import Item, Pair, Reader, Source
from halimede.pipeline.requests import encode_one
from halimede.results import MAX_IMAGE_BYTES
from halimede_ops.errors import ImageTooLarge, InvalidImage, InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Image: TypeAlias = "str | os.PathLike[str] | bytes | PilImage | Source"
"""An image as it is given: path or url, bytes of a file, a picture of PIL, a source of `find`."""

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Names that images in folders and archives end with; other files are passed over."""
HEADER_BYTES = 64 * 1024
"""Longest header of a tar: a name, or attributes. tarfile holds it in memory whatever it says."""
BYTES = bytes | bytearray | memoryview
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HEADER_TYPES = frozenset(
    (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    )
)
PNG_MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
ORIENTATION = 0x0112
"""Tag of EXIF."""
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
DAMAGED = (
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
"""What zipfile and tarfile raise for archives that are not what they should be."""


def sources(images: Iterable[Image] | Image) -> list[Source]:
    """The sources of images; of one alone, a list of one."""
    if isinstance(images, Iterable) and not isinstance(images, BYTES | str):
        return [source(image) for image in images]
    return [source(images)]


def pairs(
    texts: Sequence[str | None] | None, images: Sequence[Image | None] | None
) -> list[Source]:
    """The sources of pairs, from texts and images at the same places.

    Raises:
        InvalidInput: they are not of one number, or a place has neither.
        InvalidText: a text is not a string, or has a lone surrogate.
    """
    if texts is None:
        texts = [None] * len(images or ())
    if images is None:
        images = [None] * len(texts)
    if len(texts) != len(images):
        raise InvalidInput(
            f"{len(texts)} texts and {len(images)} images are given; give as many of both, and "
            "None where one is missing."
        )
    return [_pair(place, texts[place], images[place]) for place in range(len(texts))]


def source(given: Any) -> Source:
    """The source of an image: of its path, url, bytes, or of a PIL image; a source is its own.

    What is none of these is a source that says so when it is read.
    """
    if isinstance(given, BYTES):
        return Held(bytes(given))
    if isinstance(given, str) and URL.match(given):
        return Url(given)
    if isinstance(given, (str, os.PathLike)):
        return File(Path(given))
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(given, pil.Image):
        return Picture(given)
    if isinstance(given, Source):
        return given
    return Broken(
        InvalidImage(f"it is {type(given).__name__}; give a path, a url, bytes or a PIL image.")
    )


def find_images(where: Path | str) -> Iterator[Found]:
    """The images of a folder, of a zip or tar archive, or the one that is a file or at a url; by
    name in a folder, in an archive as it comes. Archives are read as they are gone through.

    Files that are not named as images are passed over, and so are hidden ones and links.

    Raises:
        InvalidInput: there is nothing at the path.
    """
    path = Path(where)
    if isinstance(where, str) and URL.match(where):
        yield Found(where, Url(where))
    elif path.is_dir():
        yield from _in_folder(path)
    elif not path.is_file():
        raise InvalidInput("there is no such file or folder of images.")
    elif path.name.lower().endswith(".zip"):
        yield from _in_zip(path)
    elif path.name.lower().endswith(TARS):
        yield from _in_tar(path)
    else:
        yield Found(path.name, File(path))


@dataclasses.dataclass(frozen=True)
class Found:
    """An image of a folder or an archive."""

    name: str
    """Path in the folder or archive; name of a file; url."""
    source: Source

    @property
    def held_bytes(self) -> int:
        """What it holds in memory."""
        return self.source.held_bytes

    async def read(self, reader: Reader) -> Item:
        """The image."""
        return await self.source.read(reader)


@dataclasses.dataclass(frozen=True)
class Held:
    """An image in memory."""

    data: bytes

    @property
    def held_bytes(self) -> int:
        """What it holds in memory."""
        return len(self.data)

    async def read(self, reader: Reader) -> bytes:
        """The image."""
        return checked(self.data, reader.most_bytes)


@dataclasses.dataclass(frozen=True)
class File:
    """An image in a file."""

    path: Path
    held_bytes = 0

    async def read(self, reader: Reader) -> bytes:
        """The image."""
        return await asyncio.to_thread(self._read, reader.most_bytes)

    def _read(self, most_bytes: int) -> bytes:
        try:
            facts = self.path.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise InvalidImage("it is no file.")
            check_size(facts.st_size, most_bytes)
            with self.path.open("rb") as file:
                return checked(file.read(most_bytes + 1), most_bytes)
        except OSError as error:
            raise InvalidImage(f"the file cannot be read: {error.strerror}.") from None


@dataclasses.dataclass(frozen=True)
class Url:
    """An image at a url."""

    url: str
    held_bytes = 0

    async def read(self, reader: Reader) -> bytes:
        """The image."""
        return await reader.fetch(self.url, reader.most_bytes)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of PIL, which must stay as it is until it was embedded."""

    picture: Any
    held_bytes = 0

    async def read(self, reader: Reader) -> bytes:
        """The image."""
        return checked(await asyncio.to_thread(encode, self.picture), reader.most_bytes)


@dataclasses.dataclass(frozen=True)
class Broken:
    """An image that cannot be read."""

    error: InvalidInput
    held_bytes = 0

    async def read(self, reader: Reader) -> bytes:
        """Nothing: the error is raised."""
        raise self.error


@dataclasses.dataclass(frozen=True)
class Both:
    """A text and an image, of which one may be missing."""

    text: bytes | None
    image: Source | None

    @property
    def held_bytes(self) -> int:
        """What it holds in memory."""
        held = 0 if self.image is None else self.image.held_bytes
        return held + len(self.text or b"")

    async def read(self, reader: Reader) -> Pair:
        """The pair."""
        image = None if self.image is None else await self.image.read(reader)
        assert image is None or isinstance(image, bytes)
        return Pair(self.text, image)


def encode(picture: Any) -> bytes:
    """A picture of PIL as PNG, with its EXIF orientation.

    Raises:
        InvalidImage: it has no pixels, is of a mode that cannot become RGB, or its own file is
            damaged.
    """
    out = io.BytesIO()
    try:
        exif = picture.getexif()
        turned = type(exif)()
        turned[ORIENTATION] = exif.get(ORIENTATION, 1)
        seen = picture if picture.mode in PNG_MODES else picture.convert("RGB")
        seen.save(out, "PNG", compress_level=1, exif=turned)
    except (OSError, ValueError, SyntaxError, SystemError) as error:  # its file is read only now
        raise InvalidImage(
            f"the PIL image of mode {picture.mode} and size {picture.size} cannot be encoded "
            f"({type(error).__name__})."
        ) from None
    return out.getvalue()


def checked(data: bytes, most_bytes: int) -> bytes:
    """The image, if it has at most so many bytes.

    Raises:
        ImageTooLarge: it has more.
    """
    check_size(len(data), most_bytes)
    return data


def check_size(size_bytes: int, most_bytes: int) -> None:
    """Nothing when an image of this size is taken.

    Raises:
        ImageTooLarge: it is not.
    """
    if size_bytes > most_bytes:
        raise ImageTooLarge(
            f"the image has {size_bytes:,} bytes; at most {most_bytes:,} are taken. Scale it down."
        )


def _pair(place: int, text: str | None, image: Image | None) -> Both:
    if text is None and image is None:
        raise InvalidInput(f"pair {place} has neither a text nor an image. Give one, or both.")
    return Both(
        None if text is None else encode_one(text, place),
        None if image is None else source(image),
    )


def is_image(name: str) -> bool:
    """Whether a file is named as an image, and not hidden."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _in_folder(folder: Path) -> Iterator[Found]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(filter(is_image, files)):
            path = Path(parent) / name
            if not path.is_symlink():
                yield Found(str(path.relative_to(folder)), File(path))


def _in_zip(path: Path) -> Iterator[Found]:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED:
        raise InvalidInput("the archive cannot be read: it is damaged.") from None
    with archive:
        for member in archive.infolist():
            if is_image(member.filename) and not member.is_dir():
                yield Found(member.filename, _member(member.file_size, archive.open, member))


def _in_tar(path: Path) -> Iterator[Found]:
    """The images of a tar, gone through once from its beginning."""
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            for member in archive:
                if is_image(member.name) and member.isfile():
                    yield Found(member.name, _member(member.size, archive.extractfile, member))
                archive.members = []  # type: ignore[attr-defined]  # else every header is kept
    except DAMAGED:
        yield Found(path.name, Broken(InvalidImage("the rest of the archive is damaged.")))


class _Header(tarfile.TarInfo):
    """A tar's header, refused when it has a name or attributes that would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in HEADER_TYPES and header.size > HEADER_BYTES:
            raise tarfile.ReadError("header")
        return header


def _member(size_bytes: int, opened: Any, member: Any) -> Source:
    """An image of an archive."""
    try:
        check_size(size_bytes, MAX_IMAGE_BYTES)
        with opened(member) as file:
            return Held(_read(file, size_bytes))
    except ImageTooLarge as error:
        return Broken(error)
    except DAMAGED:
        return Broken(InvalidImage("it is damaged in its archive, or encrypted."))


def _read(file: IO[bytes], size_bytes: int) -> bytes:
    data = file.read(size_bytes)
    if len(data) < size_bytes:
        raise EOFError
    return data
