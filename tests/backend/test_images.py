"""Pictures as transformers sees them, and every kind of file that is none."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.image_utils import load_image

from halimede_engine.image_reader import ImageReader
from halimede_ops import image
from halimede_ops.errors import HalimedeError, ImageTooLarge, InvalidImage
from halimede_ops.spec import ImageSpec
from halimede_tools.build.samples import pictures

PROCESSOR = CLIPImageProcessor()
SPEC = ImageSpec(
    height=224, width=224, resize=(224,), resample=3, scale=1 / 255,
    mean=tuple(PROCESSOR.image_mean), std=tuple(PROCESSOR.image_std), positions=50,
)  # fmt: skip


def expected(data: bytes, processor: CLIPImageProcessor = PROCESSOR) -> np.ndarray:
    """What transformers makes of a file: `[3, height, width]` float32.

    It is told where the channels are: left alone, it takes a picture 1 or 3 pixels high for one
    whose channels come first.
    """
    seen = load_image(Image.open(io.BytesIO(data)))
    given = processor(seen, input_data_format="channels_last", return_tensors="np")
    return given.pixel_values[0]


def scaled(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Pixels as the model's graph scales them."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    return (pixels.astype(np.float32) * np.float32(spec.scale) - mean) / std


def test_pixels_are_those_of_transformers() -> None:
    """264 files over every format, mode, orientation and aspect ratio: within 1e-5."""
    files = pictures.check_pictures()
    formats = set()
    for data in files:
        picture = image.prepare(data, SPEC)
        formats.add(picture.format)
        assert np.abs(scaled(picture.pixels, SPEC) - expected(data)).max() <= 1e-5
    assert len(files) >= 200
    assert formats == set(image.FORMATS)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 40, "width": 60}, "crop_size": {"height": 40, "width": 60}},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 47, "width": 52}},
        {"resample": 2, "size": {"shortest_edge": 70}, "crop_size": {"height": 33, "width": 64}},
        {"resample": 1, "do_resize": False},
    ],
)
def test_other_preprocessing(settings: dict) -> None:
    """Sizes, filters, and crops wider than the picture act as in transformers."""
    processor = CLIPImageProcessor(**settings)
    size = processor.size
    resize = (size["shortest_edge"],) if "shortest_edge" in size else tuple(size.values())
    crop = processor.crop_size
    spec = ImageSpec(
        height=crop["height"], width=crop["width"], positions=50, scale=1 / 255,
        resize=resize if processor.do_resize else (), resample=processor.resample,
        mean=SPEC.mean, std=SPEC.std,
    )  # fmt: skip
    for data in pictures.check_pictures(40):
        got = scaled(image.prepare(data, spec).pixels, spec)
        assert np.abs(got - expected(data, processor)).max() <= 1e-5


def test_size_is_that_of_the_picture_as_seen() -> None:
    """A picture that its EXIF turns has its height as width."""
    turned = pictures.encoded(pictures.drawn(1, 60, 40), pictures.Form("JPEG", "RGB", {}, 6))
    seen = image.prepare(turned, SPEC)
    assert (seen.width, seen.height, seen.format) == (40, 60, "JPEG")


def animated(format: str) -> bytes:
    file = io.BytesIO()
    first, second = (pictures.drawn(seed, 40, 30) for seed in (1, 2))
    first.save(file, format, save_all=True, append_images=[second])
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this size."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def bad_files() -> dict[str, tuple[bytes, type[HalimedeError], str]]:
    """Name → a file that is refused, its error, and a part of the message."""
    whole = pictures.encoded(pictures.drawn(5, 400, 300), pictures.Form("JPEG", "RGB"))
    return {
        "truncated JPEG": (whole[: len(whole) // 2], InvalidImage, "damaged"),
        "truncated header": (whole[:12], InvalidImage, "damaged"),
        "bomb": (bomb(60_000, 60_000), ImageTooLarge, "far more than the 64,000,000 pixels"),
        "small bomb": (bomb(9_000, 9_000), ImageTooLarge, "9000 x 9000"),
        "long when resized": (bomb(1, 65_000), ImageTooLarge, "1 x 65000 pixels, and"),
        "10 MB and a byte": (bytes(SPEC.max_image_bytes + 1), ImageTooLarge, "10,485,761 bytes"),
        "text": (b"hello world, I am no picture", InvalidImage, "none of JPEG, PNG"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', InvalidImage, "none of JPEG, PNG"),
        "animated WebP": (animated("WEBP"), InvalidImage, "animated WebP"),
        "zero-sized": (bomb(0, 10), InvalidImage, ""),
        "nothing": (b"", InvalidImage, "none of JPEG, PNG"),
        "zeros": (bytes(100_000), InvalidImage, "none of JPEG, PNG"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_named(name: str) -> None:
    """Each is refused by its own error, which says the image's row and not its content."""
    data, error, part = bad_files()[name]
    with pytest.raises(error, match=f"image 7 .*{part}"):
        image.prepare(data, SPEC, row=7)


def test_first_frame_of_a_gif() -> None:
    """Of an animated GIF the first frame is taken, as transformers does."""
    data = animated("GIF")
    assert np.abs(scaled(image.prepare(data, SPEC).pixels, SPEC) - expected(data)).max() <= 1e-5


def test_a_reader_gives_pictures_in_order_until_one_is_bad() -> None:
    """Those before the first bad file are as they are alone; it is named by its row, and no later
    request fails by it.
    """
    good = pictures.check_pictures(6)
    bad = bad_files()["truncated JPEG"][0]
    reader = ImageReader(SPEC, threads=2)
    reading = reader.read([*good, bad, b""])
    for data in good:
        assert np.array_equal(next(reading).pixels, image.prepare(data, SPEC).pixels)
    with pytest.raises(InvalidImage, match="image 6"):
        next(reading)
    # What comes after it is read as ever, and an empty file is named as well.
    assert [type(read) for read in reader.read(good)] == [image.PreparedImage] * 6
    with pytest.raises(InvalidImage, match="image 6"):
        list(reader.read([*good, b""]))
    reader.close()


def test_large_pictures_are_held_one_at_a_time() -> None:
    """Four threads, six pictures of 64 million pixels: never much more than one turned copy."""
    code = """
import io
import sys

sys.path[:0] = ["tests", "tests/backend"]
from PIL import Image
from halimede_engine.image_reader import ImageReader
from test_images import SPEC, peak_mb
exif = Image.Exif()
exif[0x0112] = 6
file = io.BytesIO()
Image.new("L", (8000, 8000)).save(file, "JPEG", exif=exif)
reader = ImageReader(SPEC, threads=4)
before = peak_mb()
assert len(list(reader.read([file.getvalue()] * 6))) == 6
reader.close()
print(peak_mb() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 700


def peak_mb() -> float:
    """Most memory that this program ever had; `ru_maxrss` has its parent's as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
