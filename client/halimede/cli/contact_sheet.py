"""A contact sheet: one HTML file that shows images and how near they are, and needs no other."""

from __future__ import annotations

import asyncio
import base64
import html
import io
from collections.abc import Sequence
from string import Template
from typing import NamedTuple

from halimede.extras import import_optional
from halimede.inputs.archives import NamedImage, find_images
from halimede.inputs.content import ReadOptions
from halimede.results import MAX_IMAGE_BYTES, ImageInfo
from halimede_ops.errors import HalimedeError

EDGE = 360
"""Longest edge of a thumbnail in pixels: sharp at twice the pixels of its 180."""
QUALITY = 80

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #888; --bar: #3b82f6; }
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
p { color: var(--soft); margin: .2rem 0 1.5rem }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)) }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
figure div { height: 190px; display: grid; place-items: center; background: #8881 }
img { max-width: 100%; max-height: 190px; display: block }
figcaption { padding: .5rem .7rem .6rem; overflow-wrap: anywhere }
meter { width: 100%; height: .5rem }
small { color: var(--soft) }
</style>
</head>
<body>
<h1>$title</h1>
<p>$about</p>
<main>
$figures
</main>
</body>
</html>
""")
FIGURE = Template("""\
<figure>
<div>$thumbnail</div>
<figcaption>
<b>$rank.</b> $cosine
<meter min="0" max="1" value="$cosine"></meter>
$name<br>
<small>$size</small>
</figcaption>
</figure>
""")


class Hit(NamedTuple):
    """An image that was found."""

    place: int
    """In its folder or archive, as `find_images` goes through it."""
    name: str
    cosine: float
    image: ImageInfo


def sheet(title: str, about: str, hits: Sequence[Hit], where: str) -> str:
    """The HTML of these images in this order, their thumbnails in it; names are escaped.

    Raises:
        MissingExtra: pillow is not installed.
    """
    thumbnails = _thumbnails({hit.place: hit.name for hit in hits}, where)
    figures = [
        FIGURE.substitute(
            rank=rank,
            thumbnail=thumbnails.get(hit.place, "<small>no preview</small>"),
            cosine=f"{hit.cosine:.3f}",
            name=html.escape(hit.name),
            size=html.escape(str(hit.image)),
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    return PAGE.substitute(
        title=html.escape(title), about=html.escape(about), figures="".join(figures)
    )


def _thumbnails(names: dict[int, str], where: str) -> dict[int, str]:
    """An `img` for each of these places that still has the image of this name."""
    return {
        place: image
        for place, found in enumerate(find_images(where))
        if names.get(place) == found.name and (image := _thumbnail(found))
    }


def _thumbnail(found: NamedImage) -> str | None:
    """An `img` with the image in it, or None when it cannot be read any more."""
    pillow = import_optional("PIL.Image", "images")
    turned = import_optional("PIL.ImageOps", "images").exif_transpose
    try:
        data = asyncio.run(_read(found))
        with pillow.open(io.BytesIO(data)) as image:
            image.draft("RGB", (2 * EDGE, 2 * EDGE))
            small = turned(image).convert("RGB")
            small.thumbnail((EDGE, EDGE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=QUALITY)
    except (HalimedeError, OSError, ValueError, SyntaxError, pillow.DecompressionBombError):
        return None
    encoded = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{encoded}">'


async def _read(found: NamedImage) -> bytes:
    async def fetch(url: str, max_bytes: int) -> bytes:
        raise NotImplementedError  # a folder has no urls

    item = await found.read(ReadOptions(MAX_IMAGE_BYTES, fetch))
    assert isinstance(item, bytes)
    return item
