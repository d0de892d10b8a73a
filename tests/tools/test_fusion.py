"""One vector for a text and an image: what the untrained fusion keeps, what a fit learns, served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_models
from conftest import free_options, version_folder
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from halimede_ops import fusion as ops
from halimede_ops import vectors
from halimede_ops.errors import InvalidInput, InvalidModel, ModelNotFound, QualityError
from halimede_tools.build import fusion, model_config
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import pictures
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

TEXT_DIMS, IMAGE_DIMS = 384, 512
TOPICS, MOTIFS = 40, 40


def unit(chance: np.random.Generator, *shape: int) -> np.ndarray:
    return vectors.normalise(chance.standard_normal(shape).astype(np.float32))


def halves(count: int, noise: float = 0.6) -> fusion.Pairs:
    """Pairs of views whose text says one half of an identity and whose image the other, both
    beneath variation that says nothing.
    """
    chance = np.random.default_rng(5)
    identities = chance.permutation(TOPICS * MOTIFS)[:count]

    def views(kinds: int, dims: int, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centres, nuisance = unit(chance, kinds, dims), unit(chance, 8, dims)
        first, second = (
            centres[which]
            + noise * chance.standard_normal((count, 8)).astype(np.float32) @ nuisance
            + 0.3 * unit(chance, count, dims)
            for _ in range(2)
        )
        return vectors.normalise(first), vectors.normalise(second)

    texts = views(TOPICS, TEXT_DIMS, identities // MOTIFS)
    images = views(MOTIFS, IMAGE_DIMS, identities % MOTIFS)
    return fusion.Pairs(*(fusion.Items(*both) for both in zip(texts, images)))


@pytest.mark.parametrize("text_weight", [0.5, 0.2])
def test_untrained_keeps_the_weighted_sum_of_similarities(text_weight: float) -> None:
    """From 896 numbers to 768 the error has mean 0, the deviation that theory gives a random
    projection, and is below 0.08 in 20,000 pairs.
    """
    made = fusion.untrained("t", "i", TEXT_DIMS, IMAGE_DIMS, text_weight=text_weight)
    chance = np.random.default_rng(1)
    share = chance.uniform(-1, 1, (20_000, 1)).astype(np.float32)
    text, image = unit(chance, 20_000, TEXT_DIMS), unit(chance, 20_000, IMAGE_DIMS)
    like_text = vectors.normalise(share * text + 0.5 * unit(chance, 20_000, TEXT_DIMS))
    like_image = vectors.normalise(-share * image + 0.5 * unit(chance, 20_000, IMAGE_DIMS))
    wanted = text_weight * vectors.cosine(text, like_text)
    wanted += (1 - text_weight) * vectors.cosine(image, like_image)
    error = vectors.cosine(
        vectors.fuse(text, image, made), vectors.fuse(like_text, like_image, made)
    )
    error -= wanted
    inputs, dims = TEXT_DIMS + IMAGE_DIMS, fusion.DIMS
    deviation = np.sqrt(2 * (inputs - dims) / (dims * (inputs + 2)))
    assert abs(error.mean()) < 0.002
    assert error.std() <= deviation
    assert np.abs(error).max() < 0.08


def test_untrained_loses_nothing_where_there_is_room() -> None:
    """Two models of 384 fit into 768: similarities are kept to float32's last bits."""
    made = fusion.untrained("t", "i", 384, 384)
    chance = np.random.default_rng(2)
    text, image = unit(chance, 100, 384), unit(chance, 100, 384)
    fused = vectors.fuse(text, image, made)
    assert np.allclose(fused @ fused.T, 0.5 * text @ text.T + 0.5 * image @ image.T, atol=1e-5)


def test_either_input_alone() -> None:
    """A text alone keeps the similarities of texts; nothing at all is refused."""
    made = fusion.untrained("t", "i", 384, 384)
    text = unit(np.random.default_rng(3), 50, 384)
    alone = vectors.normalise(vectors.fuse(text, None, made))
    assert np.allclose(alone @ alone.T, text @ text.T, atol=1e-5)
    assert vectors.normalise(vectors.fuse(None, text, made)).shape == (50, 768)
    with pytest.raises(InvalidInput, match="neither TEXT nor IMAGE"):
        vectors.fuse(None, None, made)


def test_fit_lifts_retrieval_above_all_others() -> None:
    """Text and image each carry half of the identity: fitted, held-out pairs find each other far
    more often than by either alone or by the untrained fusion.
    """
    pairs = halves(800)
    made = fusion.fit("t", "i", pairs.part(range(400)))
    found = fusion.compared(pairs.part(range(400, 800)), made)
    recall = {way: figures["recall_at_1"] for way, figures in found.items()}
    assert recall["fitted"] > 0.9
    assert recall["fitted"] > recall["untrained"] + 0.3
    assert recall["fitted"] > max(recall["text alone"], recall["image alone"]) + 0.3
    assert np.isfinite(made.text_projection).all() and made.dims == fusion.DIMS


def test_fit_wants_enough_pairs() -> None:
    with pytest.raises(InvalidInput, match="19 pairs are too few"):
        fusion.fit("t", "i", halves(19))


def test_files_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    """What is saved is what is loaded."""
    made = fusion.untrained("texts", "images", 8, 8, dims=16)
    ops.save(made, tmp_path)
    loaded = ops.load(tmp_path)
    assert (loaded.text_model, loaded.image_model) == ("texts", "images")
    assert np.array_equal(loaded.image_projection, made.image_projection)
    path = tmp_path / ops.FILE_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidModel, match="make the fusion again"):
        ops.load(tmp_path)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model, a CLIP, and both fusions of them; the pairs lie beside."""
    folder = tmp_path_factory.mktemp("fusion")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, make in (("texts", small_models.like_minilm), ("clip", small_models.clip)):
        build(build_request(str(make(folder / name)), name, precisions=("fp32",)), home)
    fusion.write_untrained("plain", "texts", "clip-image", 0.5, home.repository)
    fusion.write_untrained("broken", "texts", "clip-image", 0.5, home.repository)
    folder_of_broken = version_folder(home.repository / "broken")
    broken = ops.load(folder_of_broken)
    broken.image_projection[:] = np.nan
    ops.save(broken, folder_of_broken)
    fusion.write_fitted("fitted", "texts", "clip-image", write_pairs(folder), home.repository)
    return home.repository


def write_pairs(folder: Path) -> Path:
    """250 pairs: a topic in the text, a motif in the image, the rest of both by chance."""
    chance = np.random.default_rng(4)
    topics = ["volcano", "guitar", "chess", "penguin", "espresso", "cathedral", "tulip", "glacier"]
    forms = ["all about the {}", "why {} matters", "{} for beginners", "a long letter on {}"]
    lines = []
    for number in range(250):
        topic, motif = topics[number % 8], number // 8 % 8
        views = []
        for side in range(2):
            picture = np.asarray(pictures.drawn(1000 + motif, 48, 48), np.float32)
            noisy = np.clip(picture + chance.normal(0, 20, picture.shape), 0, 255)
            name = f"{number}-{side}.png"
            pictures.Image.fromarray(noisy.astype(np.uint8)).save(folder / name)
            views.append((str(chance.choice(forms)).format(topic), name))
        texts, images = zip(*views)
        lines.append(json.dumps({"text": texts, "image": images}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def test_record_says_how_it_was_made(repository: Path) -> None:
    """A fusion has its own space, says whether it was trained, and what it retrieves."""
    said = {}
    for name in ("plain", "fitted"):
        parameters = model_config.read(repository / name / "config.pbtxt").parameters
        said[name] = {key: value.string_value for key, value in parameters.items()}
        assert (said[name]["dims"], said[name]["input"]) == ("768", "multimodal")
    assert said["plain"]["fusion"].startswith("untrained: an orthonormal projection")
    assert said["fitted"]["fusion"] == "fitted to 200 pairs"
    record = json.loads((version_folder(repository / "fitted") / "quality.json").read_text())
    assert record["held_out_pairs"] == 50
    assert record["retrieval"]["fitted"]["mrr"] > record["retrieval"]["untrained"]["mrr"]
    spaces = {said[name]["space"] for name in said}
    spaces |= {model_config.space(repository / name / "config.pbtxt") for name in ("texts", "clip")}
    assert len(spaces) == 4


def test_wrong_models_and_pairs_are_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="clip embeds no images"):
        fusion.write_untrained("m", "texts", "clip", 0.5, repository)
    with pytest.raises(ModelNotFound, match="no built model 'other'"):
        fusion.write_untrained("m", "other", "clip-image", 0.5, repository)
    with pytest.raises(InvalidInput, match="text_weight is 1.5"):
        fusion.write_untrained("m", "texts", "clip-image", 1.5, repository)
    (tmp_path / "pairs").write_text('{"text": ["a"]}')
    with pytest.raises(InvalidInput, match="file of pairs cannot be read"):
        fusion.write_fitted("m", "texts", "clip-image", tmp_path / "pairs", repository)


def test_pairs_that_teach_nothing_are_refused(repository: Path, tmp_path: Path) -> None:
    """Where the second view has nothing of the first, no fusion is written."""
    picture = pictures.encoded(pictures.drawn(1, 20, 20), pictures.FORMS[1])
    (tmp_path / "same.png").write_bytes(picture)
    line = json.dumps({"text": ["one thing", "one thing"], "image": ["same.png", "same.png"]})
    (tmp_path / "pairs").write_text("\n".join([line] * 40))
    with pytest.raises(QualityError, match="no better than untrained"):
        fusion.write_fitted("m", "texts", "clip-image", tmp_path / "pairs", repository)
    assert not (repository / "m").exists()


@pytest.fixture(scope="module")
def client(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[triton_grpc.InferenceServerClient]:
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(repository, Settings().python_backend, run, free_options()) as running:
        with triton_grpc.InferenceServerClient(running.grpc_address) as opened:
            yield opened


def embed(client: triton_grpc.InferenceServerClient, model: str, **given: object) -> np.ndarray:
    inputs = []
    for name, value in given.items():
        kind, dtype = ("INT32", np.int32) if name == "DIMENSIONS" else ("BYTES", np.object_)
        inputs.append(triton_grpc.InferInput(name, [1, 1], kind))
        inputs[-1].set_data_from_numpy(np.array([[value]], dtype))
    return client.infer(model, inputs).as_numpy("EMBEDDING")


@pytest.mark.parametrize("model", ["plain", "fitted"])
def test_served_fusion_is_the_operation_on_both_models(
    client: triton_grpc.InferenceServerClient, repository: Path, model: str
) -> None:
    """Both inputs, either alone, and fewer dimensions: as `fuse` gives them."""
    made = ops.load(version_folder(repository / model))
    text, image = b"a letter on chess", pictures.check_pictures(1)[0]
    text_vector = embed(client, "texts", TEXT=text)
    image_vector = embed(client, "clip-image", IMAGE=image)
    for given, parts in (
        ({"TEXT": text, "IMAGE": image}, (text_vector, image_vector)),
        ({"TEXT": text}, (text_vector, None)),
        ({"IMAGE": image}, (None, image_vector)),
    ):
        expected = vectors.normalise(vectors.fuse(*parts, made))
        got = embed(client, model, **given)
        assert got.shape == (1, 768)
        assert vectors.cosine(got, expected)[0] >= 0.99999
        cut = embed(client, model, **given, DIMENSIONS=64)
        assert vectors.cosine(cut, expected[:, :64])[0] >= 0.99999


def test_a_fused_vector_that_is_not_finite_is_an_error(
    client: triton_grpc.InferenceServerClient,
) -> None:
    """It is that of its request alone: a text, which has no part in it, is answered."""
    image = pictures.check_pictures(1)[0]
    with pytest.raises(InferenceServerException, match="NonFiniteVector: input 0 has no vector"):
        embed(client, "broken", TEXT=b"a", IMAGE=image)
    assert np.isfinite(embed(client, "broken", TEXT=b"a")).all()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"TEXT": b"a", "IMAGE": b"none"}, "^.*InvalidImage: image 0 is none of JPEG"),
        ({"TEXT": b"\xff"}, "InvalidText: text 0 is not valid UTF-8"),
        ({"TEXT": b"a", "DIMENSIONS": 769}, "InvalidDimensions: dimensions is 769; plain gives 1"),
        ({"DIMENSIONS": 5}, "InvalidInput: neither TEXT nor IMAGE"),
        ({"TEXT": b"a", "INPUT_TYPE": b"nonsense"}, "UnknownInputType"),
    ],
)
def test_bad_input_has_the_error_of_the_model_that_refuses_it(
    client: triton_grpc.InferenceServerClient, given: dict, match: str
) -> None:
    """What a model answers is handed on as it is; the next request is answered."""
    with pytest.raises(InferenceServerException, match=match):
        embed(client, "plain", **given)
    assert embed(client, "plain", TEXT=b"a").shape == (1, 768)
