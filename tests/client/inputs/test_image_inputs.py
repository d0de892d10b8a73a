"""Images as they are given: files, pictures of PIL, folders, archives."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from web import MIB, PNG

from halimede import Embedder, HalimedeError, ImageTooLarge, InvalidImage, InvalidInput, find_images
from halimede.inputs.images import encode

HASH = {"models": {"m": {"provider": "hash"}}}


def png(seed: int) -> bytes:
    """A picture that only this seed has."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def vectors(images: list[bytes]) -> np.ndarray:
    with Embedder(config=HASH) as embedder:
        return embedder.embed_images(images).vectors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders of images, with what else lies around in such."""
    files = {"b.png": png(1), "a/c.JPG": png(2), "a/z.webp": b"no image", "0.png": png(0)}
    others = {"notes.txt": b"x", ".hidden.png": png(9), "a/.DS_Store": b"x"}
    for name, data in (files | others).items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "photos" / "link.png").symlink_to("/etc/passwd")
    return tmp_path / "photos"


def zipped(folder: Path, to: Path) -> Path:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_symlink():
                archive.write(path, path.relative_to(folder))
    return to


def tarred(folder: Path, to: Path) -> Path:
    with tarfile.open(to, f"w:{to.suffix[1:]}" if to.suffix != ".tar" else "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, path.relative_to(folder), recursive=False)
    return to


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz", "tar.xz", "file"])
def test_folders_and_archives_give_their_images(folder: Path, tmp_path: Path, form: str) -> None:
    """Images by name, each the bytes of its file; what is hidden, linked or no image is not."""
    names = ["0.png", "b.png", "a/c.JPG", "a/z.webp"]
    path = folder
    if form == "zip":
        path, names = zipped(folder, tmp_path / "x.zip"), sorted(names, key=Path)
    elif form.startswith("tar"):
        path, names = tarred(folder, tmp_path / f"x.{form}"), sorted(names, key=Path)
    elif form == "file":
        path, names = folder / "0.png", ["0.png"]
    found = list(find_images(path))
    assert [image.name for image in found] == names
    with Embedder(config=HASH) as embedder:
        parts = list(embedder.embed_images_iter(find_images(path), window=3))
    given = vectors([(folder / name).read_bytes() for name in names])
    assert (np.concatenate([part.vectors for part in parts]) == given).all()
    assert [i for part in parts for i in part.indices.tolist()] == list(range(len(names)))


def test_a_broken_archive_gives_what_is_whole(tmp_path: Path) -> None:
    """Members that are too large, damaged or encrypted, and an end that is missing, are errors
    in their places; the images before and after are embedded.
    """
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", png(1))
        archive.writestr("damaged.png", b"damaged here")
        archive.writestr("bomb.png", bytes(64 * MIB + 1), zipfile.ZIP_DEFLATED)
        archive.writestr("2.png", png(2))
    path.write_bytes(path.read_bytes().replace(b"damaged here", b"damaged herE"))
    cut = tmp_path / "x.tar.gz"
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for number in range(3):
            noise = np.random.default_rng(number).bytes(50_000)
            header = tarfile.TarInfo(f"{number}.png")
            header.size = len(noise)
            archive.addfile(header, io.BytesIO(noise))
    cut.write_bytes(gzip.compress(whole.getvalue())[:-60_000])
    with Embedder(config=HASH) as embedder:
        [part] = embedder.embed_images_iter(find_images(path), errors="collect")
        assert part.indices.tolist() == [0, 3]
        assert (part.vectors == vectors([png(1), png(2)])).all()
        assert {at: type(error) for at, error in part.errors.items()} == {
            1: InvalidImage,
            2: ImageTooLarge,
        }
        [part] = embedder.embed_images_iter(find_images(cut), errors="collect")
        assert part.indices.tolist() == [0]
        assert "damaged" in str(part.errors[1])
    (tmp_path / "no.zip").write_bytes(b"PK" + bytes(30))
    for path in (tmp_path / "none", tmp_path / "no.zip"):
        with pytest.raises(HalimedeError):
            list(vectors([image.source.data for image in find_images(path)]))  # type: ignore


def test_a_tar_of_endless_names_fills_no_memory(tmp_path: Path) -> None:
    """A header that claims a name of 500 MB ends the archive instead of being held."""
    path = tmp_path / "x.tar.gz"
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 500 * MIB
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(500):
            out.write(bytes(MIB))
    # In a process of its own: threads that other tests left would count.
    code = (
        "import sys, psutil; from halimede import find_images; process = psutil.Process(); "
        "before = process.memory_info().rss; [found] = find_images(sys.argv[1]); "
        "print(process.memory_info().rss - before)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * MIB
    [found] = find_images(path)
    with Embedder(config=HASH) as embedder, pytest.raises(InvalidImage, match="damaged"):
        embedder.embed_images(found)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_pil_lose_nothing(mode: str) -> None:
    """What is encoded has the same pixels, mode for mode."""
    picture = pictured(mode)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(picture)))), np.asarray(picture))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "F", "I"])
def test_other_pictures_of_pil_are_as_the_model_sees_them(mode: str) -> None:
    """What PNG cannot hold becomes RGB."""
    picture = pictured(mode)
    seen = Image.open(io.BytesIO(encode(picture)))
    assert np.array_equal(np.asarray(seen), np.asarray(picture.convert("RGB")))


def pictured(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 11, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def test_a_picture_of_pil_keeps_its_orientation() -> None:
    """A picture that is seen turned by its EXIF is seen turned when it was encoded."""
    picture = Image.new("RGB", (4, 8))
    picture.getexif()[0x0112] = 6
    assert Image.open(io.BytesIO(encode(picture))).getexif()[0x0112] == 6


def test_what_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    """Each bad item has its own error, without its path; the good ones are embedded."""
    exact, large = tmp_path / "exact.png", tmp_path / "s3cret.png"
    exact.write_bytes(bytes(10 * MIB))
    large.write_bytes(bytes(10 * MIB + 1))
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    damaged = Image.open(io.BytesIO(png(1)[:-60]))
    bad = [large, bytes(10 * MIB + 1), tmp_path / "s3cret", fifo, tmp_path, 3, None, damaged]
    bad += [Image.new("RGB", (0, 2)), "/dev/zero"]
    with Embedder(config=HASH) as embedder:
        result = embedder.embed_images([exact, *bad, PNG], errors="collect")
        assert result.indices.tolist() == [0, len(bad) + 1]
        assert len(result) == len(result.images) == len(result.cached) == 2
        types = [type(error) for error in result.errors.values()]
        assert types == [ImageTooLarge] * 2 + [InvalidImage] * (len(bad) - 2)
        for place, error in result.errors.items():
            assert str(error).startswith(f"image {place}: ")
            assert error.index == place
            assert "s3cret" not in str(error)
        with pytest.raises(
            ImageTooLarge, match=r"image [12]: .* 10,485,761 bytes; at most 10,485,760"
        ):
            embedder.embed_images([exact, *bad])


def test_pairs_are_of_one_number() -> None:
    """A text without its image's place, and a place of neither, are refused."""
    with Embedder(config=HASH) as embedder:
        assert embedder.embed_multimodal(["a", None, "b"], [None, PNG, PNG]).vectors.shape[0] == 3
        assert embedder.embed_multimodal(None, [PNG]).vectors.shape[0] == 1
        assert embedder.embed_multimodal([], []).vectors.shape[0] == 0
        for texts, images in ((["a"], []), ([None], [None]), (None, [None])):
            with pytest.raises(InvalidInput):
                embedder.embed_multimodal(texts, images)


def test_many_files_stay_out_of_memory(tmp_path: Path) -> None:
    """400 files of 2 MB, in one call and as a stream, grow the process by less than 200 MB."""
    paths = [tmp_path / f"{number}.png" for number in range(400)]
    paths[0].write_bytes(bytes(2 * MIB))
    for path in paths[1:]:
        os.link(paths[0], path)
    process = psutil.Process()
    with Embedder(config=HASH) as embedder:
        before = process.memory_info().rss
        assert len(embedder.embed_images(paths)) == 400
        peak = max(
            process.memory_info().rss for _ in embedder.embed_images_iter(find_images(tmp_path))
        )
    assert peak - before < 200 * MIB
