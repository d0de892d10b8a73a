"""`halimede embed-image` and `halimede search-images`, run as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import halimede

from halimede import Embedder

COLOURS = {"red": (220, 20, 20), "green": (20, 160, 20), "blue": (20, 20, 220)}
ODD_NAME = '<b onload="x">& {$name}.png'


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "development.yaml"
    file.write_text("models: {m: {provider: hash}}\ndevelopment: true\n")
    return str(file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    Image.new("RGB", (40, 30)).save(folder / ODD_NAME)
    return folder


def test_embed_image_prints_and_writes_vectors(photos: Path, config: str, tmp_path: Path) -> None:
    """Names and vectors as JSON, and `[images, dims]` in --npy, those of the library."""
    out = tmp_path / "vectors.npy"
    done = halimede("embed-image", str(photos), "--json", "--npy", str(out), "--config", config)
    told = json.loads(done.stdout)
    names = [row["name"] for row in told["embeddings"]]
    assert names == sorted([ODD_NAME, *(f"{name}.png" for name in COLOURS)])
    with Embedder(config=config) as embedder:
        expected = embedder.embed_images([photos / name for name in names]).vectors
    assert np.array_equal(np.load(out), expected)
    assert np.allclose([row["embedding"] for row in told["embeddings"]], expected)
    assert halimede("embed-image", str(photos), "--config", config).stdout.count(b"\n") == 5


def test_a_bad_image_is_told_and_the_others_embedded(photos: Path, config: str) -> None:
    """Exit code 1, one line on stderr an image, and the rest on stdout."""
    (photos / "large.png").write_bytes(bytes(10 * 2**20 + 1))
    given = [str(photos), "https://127.0.0.1/a.png", str(photos / "red.png")]
    done = halimede("embed-image", *given, "--json", "--config", config)
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert len(told["embeddings"]) == 5
    found = [(row["name"], row["error"]) for row in told["errors"]]
    assert found == [("large.png", "ImageTooLarge"), ("https://127.0.0.1/a.png", "UrlRefused")]
    assert len(done.stderr.splitlines()) == 2
    for nothing in ("/no/such/folder", str(photos.parent / "empty")):
        (photos.parent / "empty").mkdir(exist_ok=True)
        done = halimede("embed-image", nothing, "--config", config)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"error: there is no")


def test_search_images_finds_the_image_itself(photos: Path, config: str, tmp_path: Path) -> None:
    """An image file as query is its own nearest; a text gives as many rows as asked."""
    done = halimede("search-images", str(photos / "red.png"), str(photos), "--config", config)
    assert b"red.png" in done.stdout.splitlines()[1]
    done = halimede(
        "search-images", "a cat", str(photos), "--top", "2", "--json", "--config", config
    )
    assert len(json.loads(done.stdout)) == 2


def test_the_contact_sheet_is_one_safe_file(photos: Path, config: str, tmp_path: Path) -> None:
    """Thumbnails are in it; names and query are escaped; no script, nothing from elsewhere."""
    page = tmp_path / "sheet.html"
    query = "<script>alert(1)</script> ${name}"
    done = halimede("search-images", query, str(photos), "--html", str(page), "--config", config)
    assert done.returncode == 0
    html = page.read_text()
    assert html.count('<img alt="" loading="lazy" src="data:image/jpeg;base64,') == 4
    assert "&lt;b onload=&quot;x&quot;&gt;&amp; {$name}.png" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ${name}" in html
    assert "<script" not in html
    assert "<b onload" not in html
    assert not re.findall(r"https?://", html)
