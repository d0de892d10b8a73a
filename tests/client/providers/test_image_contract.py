"""What every provider that embeds images must hold, asked of each through the embedder."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulations
import small_models
from conftest import free_options
from PIL import Image, ImageOps
from test_cli import halimede

from halimede import (
    AsyncEmbedder,
    DeadlineExceeded,
    Embedder,
    ImageInfo,
    ImageTooLarge,
    InvalidDimensions,
    InvalidImage,
    UnsupportedInput,
    find_images,
)
from halimede_ops import vectors
from halimede_tools.build.fusion import write_untrained
from halimede_tools.build.plan import build, build_request
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

KINDS = ("triton-grpc", "triton-http", "onnx", "sentence_transformers", "hash")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TURNED = 6
"""EXIF: seen a quarter turn clockwise."""


def encoded(seed: int, form: str, size: tuple[int, int], **options: Any) -> bytes:
    """A picture that only this seed has."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(low).resize(size, Image.Resampling.BILINEAR).save(out, form, **options)
    return out.getvalue()


def exif() -> Image.Exif:
    turned = Image.Exif()
    turned[0x0112] = TURNED
    return turned


PICTURES = [
    encoded(seed, FORMATS[seed % 6], (20 + 13 * seed % 180, 20 + 29 * seed % 150))
    for seed in range(40)
] + [encoded(99, "JPEG", (64, 32), exif=exif())]
BROKEN = [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", PICTURES[1][:90]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.like_sentence_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def home(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("clip")
    home = Settings(home=folder / "home", repository=folder / "repository")
    build(build_request(str(source), "clip", precisions=("fp32",)), home)
    write_untrained("multimodal", "clip", "clip-image", 0.5, home.repository)
    return home


@pytest.fixture(scope="module")
def server(home: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, free_options()) as running:
        yield running


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(kind: str, server: wheel.Server, home: Settings, source: Path) -> dict[str, Any]:
    """The configuration of one provider alone."""
    options = {
        "triton-grpc": {"model_id": "clip", "url": server.grpc_address},
        "triton-http": {"model_id": "clip", "url": f"http://{server.http_address}"},
        "onnx": {"model_id": "clip", "path": str(home.repository)},
        "sentence_transformers": {"model_id": "clip", "path": str(source)},
        "hash": {"model_id": "hash"},
    }[kind]
    return {"models": {"only": {"provider": kind.partition("-")[0], "timeout": 180, **options}}}


@pytest.fixture(scope="module")
def embedder(config: dict[str, Any]) -> Iterator[Embedder]:
    with Embedder(config=config) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(source: Path) -> np.ndarray:
    """sentence-transformers' embeddings of PICTURES."""
    from sentence_transformers import SentenceTransformer

    seen = [
        ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB") for data in PICTURES
    ]
    model = SentenceTransformer(str(source), device="cpu")
    return model.encode(seen, show_progress_bar=False)


def test_vectors_are_those_of_the_model(
    embedder: Embedder, kind: str, expected: np.ndarray
) -> None:
    """Every format and shape has the vector that sentence-transformers gives, in order."""
    result = embedder.embed_images(PICTURES)
    assert len(result) == len(PICTURES)
    assert result.provider == kind.partition("-")[0]
    if kind != "hash":
        assert vectors.cosine(result.vectors, expected).min() >= 0.99999
    alone = np.concatenate([embedder.embed_images(PICTURES[at]).vectors for at in (0, 17, 40)])
    assert vectors.cosine(result.vectors[[0, 17, 40]], alone).min() >= 0.99999


def test_images_and_texts_share_a_space(embedder: Embedder) -> None:
    """A text's vector and an image's can be compared: one space, one length."""
    image, text = embedder.embed_images(PICTURES[0]), embedder.embed("a photo")
    assert (image.space, image.precision, image.dims) == (text.space, text.precision, text.dims)
    assert text.images == ()
    assert image.tokens.tolist() == [-1]
    assert not image.truncated.any()


def test_each_image_is_told(embedder: Embedder, kind: str) -> None:
    """Width and height are those seen, after EXIF; the format is Pillow's name."""
    result = embedder.embed_images([PICTURES[0], PICTURES[2], PICTURES[40]])
    if kind == "hash":
        assert result.images == (ImageInfo(0, 0, ""),) * 3
        return
    sizes = [Image.open(io.BytesIO(PICTURES[at])).size for at in (0, 2)]
    assert result.images == ((*sizes[0], "JPEG"), (*sizes[1], "WEBP"), (32, 64, "JPEG"))


def test_a_bad_image_fails_alone(embedder: Embedder, kind: str) -> None:
    """With `collect` each bad image has its error at its place and no row; the good ones have
    theirs. With `raise` the call ends with one of the errors.
    """
    if kind == "hash":
        pytest.skip("a hash does not look into its images")
    large = bytes(10 * 2**20 + 1)
    given = [PICTURES[0], *BROKEN, large, PICTURES[3]]
    result = embedder.embed_images(given, errors="collect")
    assert result.indices.tolist() == [0, 6]
    assert len(result.images) == len(result.vectors) == len(result.cached) == 2
    whole = embedder.embed_images([PICTURES[0], PICTURES[3]]).vectors
    assert vectors.cosine(result.vectors, whole).min() >= 0.99999
    assert set(result.errors) == {1, 2, 3, 4, 5}
    assert all(isinstance(result.errors[at], InvalidImage) for at in (1, 2, 3, 4))
    assert isinstance(result.errors[5], ImageTooLarge)
    assert all(str(error).startswith(f"image {at}") for at, error in result.errors.items())
    assert all(error.index == at for at, error in result.errors.items())
    with pytest.raises(InvalidImage, match="image 2"):
        embedder.embed_images([PICTURES[0], PICTURES[3], BROKEN[1]])
    assert len(embedder.embed_images(BROKEN, errors="collect")) == 0


def test_nothing_in_gives_no_rows(embedder: Embedder) -> None:
    """No image gives arrays of no rows and the right width."""
    result = embedder.embed_images([])
    assert result.vectors.shape[0] == len(result.images) == len(result.indices) == 0
    assert result.vectors.shape[1] > 0


def test_dimensions_and_output_types(embedder: Embedder) -> None:
    """Fewer dimensions are the leading ones of norm 1; output types are those of texts."""
    full = embedder.embed_images(PICTURES[:3]).vectors
    cut = embedder.embed_images(PICTURES[:3], dimensions=16).vectors
    assert vectors.cosine(cut, full[:, :16]).min() >= 0.99999
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-4)
    assert embedder.embed_images(PICTURES[:3], output_type="ubinary").vectors.dtype == np.uint8
    with pytest.raises(InvalidDimensions):
        embedder.embed_images(PICTURES[0], dimensions=100_000)


def test_a_stream_gives_what_a_call_gives(embedder: Embedder, kind: str, tmp_path: Path) -> None:
    """Parts of a folder's images and of a generator's are those of one call; places count on."""
    for number, picture in enumerate(PICTURES):
        (tmp_path / f"{number:02}.jpg").write_bytes(picture)
    (tmp_path / "07.jpg").write_bytes(BROKEN[1])
    whole = embedder.embed_images(PICTURES).vectors
    parts = list(embedder.embed_images_iter(find_images(tmp_path), window=8, errors="collect"))
    assert [len(part) + len(part.errors) for part in parts] == [8, 8, 8, 8, 8, 1]
    places = np.concatenate([part.indices for part in parts])
    if kind != "hash":
        assert list(parts[0].errors) == [7]
        assert places.tolist() == [at for at in range(41) if at != 7]
        joined = np.concatenate([part.vectors for part in parts])
        assert vectors.cosine(joined, whole[places]).min() >= 0.99999


def test_what_is_cached_is_told_as_before(config: dict[str, Any], tmp_path: Path) -> None:
    """The second call's vectors and sizes come from the cache, a text's never do, and what was
    wrong is asked again.
    """
    with Embedder(config={**config, "cache": {"disk": {"path": str(tmp_path)}}}) as embedder:
        first = embedder.embed_images(PICTURES[:3])
        again = embedder.embed_images([*PICTURES[:3], BROKEN[1]], errors="collect")
        assert again.cached[:3].all()
        assert not first.cached.any()
        assert np.array_equal(again.vectors[:3], first.vectors)
        assert again.images[:3] == first.images
        embedder.embed("x")
        shared = embedder.embed_images([b"x"], errors="collect")
        assert not shared.cached.any()


def test_a_deadline_ends_the_call_and_nothing_else(embedder: Embedder) -> None:
    """A call that takes longer ends with DeadlineExceeded; the next works."""
    with pytest.raises(DeadlineExceeded, match="images were not embedded"):
        embedder.embed_images(PICTURES * 50, deadline_s=0.005)
    assert len(embedder.embed_images(PICTURES[0])) == 1


def test_tasks_share_an_embedder(config: dict[str, Any], embedder: Embedder) -> None:
    """Tasks of one program get their own vectors, from calls and from streams."""
    whole = embedder.embed_images(PICTURES).vectors

    async def ask() -> np.ndarray:
        async with AsyncEmbedder(config=config) as opened:
            calls = [opened.embed_images(picture) for picture in PICTURES]
            found = np.concatenate([one.vectors for one in await asyncio.gather(*calls)])
            parts = [part.vectors async for part in opened.embed_images_iter(PICTURES, window=16)]
            assert vectors.cosine(np.concatenate(parts), found).min() >= 0.99999
            return found

    assert vectors.cosine(asyncio.run(ask()), whole).min() >= 0.99999


def test_a_model_of_images_alone_says_so(server: wheel.Server, home: Settings) -> None:
    """`clip-image` can be named itself, is healthy, and refuses texts and pairs by name."""
    triton_model = {"provider": "triton", "model_id": "clip-image", "url": server.grpc_address}
    local = {"provider": "onnx", "model_id": "clip-image", "path": str(home.repository)}
    for model in (triton_model, local):
        with Embedder(config={"models": {"m": model}}) as embedder:
            assert len(embedder.embed_images(PICTURES[:2])) == 2
            assert embedder.model.input == "image"
            assert embedder.health()[0]["healthy"]
            with pytest.raises(UnsupportedInput, match="call embed_images"):
                embedder.embed("a")
            with pytest.raises(UnsupportedInput):
                embedder.embed_multimodal(["a"], None)


def test_a_chain_passes_over_what_embeds_no_images(server: wheel.Server, home: Settings) -> None:
    """A provider of texts alone is passed over by images, and so is one that is not there."""
    with simulations.serve(simulations.ollama) as ollama:
        models = {
            "texts": {"provider": "ollama", "model_id": "minilm", "url": ollama.url},
            "gone": {"provider": "triton", "model_id": "clip", "url": "127.0.0.1:1", "retries": 0},
            "local": {"provider": "onnx", "model_id": "clip", "path": str(home.repository)},
        }
        config = {"models": models, "fallback": ["gone", "local"]}
        with Embedder(config=config) as embedder:
            result = embedder.embed_images(PICTURES[:2])
            assert (result.provider, result.model) == ("onnx", "clip-image")
        with Embedder(config={"models": {"texts": models["texts"]}}) as embedder:
            with pytest.raises(UnsupportedInput, match="ollama:minilm embeds texts, not images"):
                embedder.embed_images(PICTURES[:2])


def test_the_command_embeds_and_searches(server: wheel.Server, tmp_path: Path) -> None:
    """`models` shows what each takes; `embed-image` and `search-images` ask the server."""
    rows = json.loads(halimede("models", "--json", server=server).stdout)
    inputs = {"clip": "text", "clip-image": "image", "multimodal": "multimodal"}
    assert {row["name"]: row["input"] for row in rows} == inputs
    for place in range(3):
        (tmp_path / f"{place}.png").write_bytes(PICTURES[place])
    done = halimede("embed-image", str(tmp_path), "--model", "clip", "--json", server=server)
    told = json.loads(done.stdout)["embeddings"]
    assert [(row["name"], row["format"]) for row in told] == [
        ("0.png", "JPEG"),
        ("1.png", "PNG"),
        ("2.png", "WEBP"),
    ]
    for query in ("a photo", str(tmp_path / "1.png")):
        search = ("search-images", query, str(tmp_path), "--model", "clip", "--json")
        hits = json.loads(halimede(*search, server=server).stdout)
        assert [hit["cosine"] for hit in hits] == sorted([hit["cosine"] for hit in hits])[::-1]
        assert len(hits) == 3
    assert (hits[0]["name"], round(hits[0]["cosine"], 3)) == ("1.png", 1.0)
    done = halimede("embed-image", str(tmp_path), server=server, given=b"")
    assert done.returncode == 1


def test_pairs_have_one_vector_whoever_embeds_them(server: wheel.Server, home: Settings) -> None:
    """Texts with images, and either alone, have the same vectors over gRPC, HTTP and in process;
    a bad image fails its pair alone, and texts or images by themselves are refused.
    """
    texts = [None if place % 3 == 0 else f"text {place}" for place in range(12)]
    images = [None if place % 3 == 1 else PICTURES[place] for place in range(12)]
    given = ([*texts, "a"], [*images, BROKEN[1]])
    found = []
    for model in (
        {"provider": "triton", "url": server.grpc_address},
        {"provider": "triton", "url": f"http://{server.http_address}"},
        {"provider": "onnx", "path": str(home.repository)},
    ):
        with Embedder(config={"models": {"m": {"model_id": "multimodal", **model}}}) as embedder:
            result = embedder.embed_multimodal(*given, errors="collect")
            assert result.vectors.shape == (12, 768)
            assert [type(error) for error in result.errors.values()] == [InvalidImage]
            assert (result.model, embedder.model.input) == ("multimodal", "pair")
            assert embedder.health()[0]["healthy"]
            cut = embedder.embed_multimodal(texts, images, dimensions=64, input_type="query")
            assert cut.vectors.shape == (12, 64)
            for refused in (embedder.embed, embedder.embed_images):
                with pytest.raises(UnsupportedInput, match="call embed_multimodal"):
                    refused("a")
        found.append(result.vectors)
    assert vectors.cosine(found[0], found[1]).min() >= 0.99999
    assert vectors.cosine(found[0], found[2]).min() >= 0.99999
