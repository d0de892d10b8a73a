"""Damaged picture files, made from whole ones by seeded chance; as a command: decode them all."""

from __future__ import annotations

import collections
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).parent / "backend"))  # as a command

from halimede_tools.build.samples import pictures

SIZES = ((90, 70), (33, 64), (128, 128))


def whole_files() -> list[bytes]:
    """One file of every form, some animated or with several pages."""
    files = [
        pictures.encoded(pictures.drawn(seed, *SIZES[seed % len(SIZES)]), form)
        for seed, form in enumerate(pictures.FORMS)
    ]
    frames = [pictures.drawn(seed, 40, 30) for seed in range(3)]
    for format in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:])
        files.append(file.getvalue())
    return files


def flip(data: bytearray, chance: random.Random, _: list[bytes]) -> bytearray:
    for _flip in range(chance.choice((1, 2, 8, 40))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def truncate(data: bytearray, chance: random.Random, _: list[bytes]) -> bytearray:
    return data[: chance.randrange(len(data))]


def splice(data: bytearray, chance: random.Random, files: list[bytes]) -> bytearray:
    """The head of one file and the tail of another."""
    other = chance.choice(files)
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


def edit_header(data: bytearray, chance: random.Random, _: list[bytes]) -> bytearray:
    """Numbers in the first bytes become very large, very small or anything."""
    for _edit in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(min(len(data), 80))
        value = chance.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", chance.randbytes(4)))
        width = chance.choice((1, 2, 4))
        data[place : place + width] = value[:width]
    return data


def repeat(data: bytearray, chance: random.Random, _: list[bytes]) -> bytearray:
    """A part of the file again and again."""
    start = chance.randrange(len(data))
    part = data[start : start + chance.randrange(1, 200)]
    return data[:start] + part * chance.randrange(2, 50) + data[start:]


MUTATIONS: tuple[Callable[[bytearray, random.Random, list[bytes]], bytearray], ...] = (
    flip, truncate, splice, edit_header, repeat,
)  # fmt: skip


def mutated(count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged files, the same on every machine."""
    files = whole_files()
    chance = random.Random(seed)
    for number in range(count):
        data = bytearray(files[number % len(files)])
        mutate = MUTATIONS[number // len(files) % len(MUTATIONS)]
        yield bytes(mutate(data, chance, files))


def decode_all(count: int) -> dict[str, int]:
    """How many of `count` damaged files end how, and this process's peak memory in MB."""
    from test_images import SPEC, peak_mb

    from halimede_ops import image
    from halimede_ops.errors import HalimedeError

    outcomes: collections.Counter[str] = collections.Counter()
    for data in mutated(count):
        try:
            picture = image.prepare(data, SPEC)
            assert picture.pixels.shape == (3, 224, 224)
            outcomes["picture"] += 1
        except HalimedeError as error:
            outcomes[type(error).__name__] += 1
    return {**outcomes, "peak_mb": int(peak_mb())}


if __name__ == "__main__":
    Image.init()
    print(json.dumps(decode_all(int(sys.argv[1]))))
