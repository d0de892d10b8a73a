"""A contact sheet: one self-contained HTML file that shows images and their cosines."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from string import Template
from typing import NamedTuple

from halimede.cli.printing import printable
from halimede.extras import import_optional
from halimede.inputs.archives import MAX_MEMBER_BYTES, NamedImage, find_images
from halimede.inputs.content import ReadOptions
from halimede.results import ImageInfo
from halimede_ops.errors import HalimedeError

EDGE = 360
"""Longest edge of a thumbnail in pixels: twice the 180 it is shown at, for dense screens."""
JPEG_QUALITY = 80

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
    """An image that a search returned."""

    position: int
    """Index in the order in which `find_images` yields the images."""
    name: str
    cosine: float
    image: ImageInfo


def sheet(title: str, about: str, hits: Sequence[Hit], where: str) -> str:
    """Return the HTML of these images in this order, with thumbnails; names are escaped.

    Raises:
        MissingExtra: pillow is not installed.
    """
    thumbnails = _thumbnails({hit.position: hit.name for hit in hits}, where)
    figures = [
        FIGURE.substitute(
            rank=rank,
            thumbnail=thumbnails.get(hit.position, "<small>no preview</small>"),
            cosine=f"{hit.cosine:.3f}",
            name=html.escape(printable(hit.name)),
            size=html.escape(str(hit.image)),
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    return PAGE.substitute(
        title=html.escape(printable(title)), about=html.escape(about), figures="".join(figures)
    )


def _thumbnails(names: dict[int, str], where: str) -> dict[int, str]:
    """An `img` for each index at which the image still has this name."""
    return {
        index: thumbnail
        for index, image in enumerate(find_images(where))
        if names.get(index) == image.name and (thumbnail := _thumbnail(image))
    }


def _thumbnail(image: NamedImage) -> str | None:
    """An `img` that contains the thumbnail, or None if the image cannot be read now."""
    pillow = import_optional("PIL.Image", "images")
    turned = import_optional("PIL.ImageOps", "images").exif_transpose
    try:
        data = _read(image)
        with pillow.open(io.BytesIO(data)) as full:
            full.draft("RGB", (2 * EDGE, 2 * EDGE))
            small = turned(full).convert("RGB")
            small.thumbnail((EDGE, EDGE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=JPEG_QUALITY)
    except (HalimedeError, OSError, ValueError, SyntaxError, pillow.DecompressionBombError):
        return None
    encoded = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{encoded}">'


def _read(image: NamedImage) -> bytes:
    def fetch(url: str, max_bytes: int) -> bytes:
        raise NotImplementedError  # a folder has no urls

    item = image.read(ReadOptions(MAX_MEMBER_BYTES, fetch))
    assert isinstance(item, bytes)
    return item
