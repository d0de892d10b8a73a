"""SigLIP and models of images alone: built, served by a real Triton and in process, as transformers
gives them.
"""

from __future__ import annotations

import inspect
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forms
import numpy as np
import pytest
import small_image_models as small
import torch
import transformers as hf
from conftest import free_options, version_folder
from PIL import Image
from sentence_transformers import SentenceTransformer
from test_cli import halimede
from test_images import expected as pixel_values
from test_images import scaled
from transformers.image_utils import load_image

from halimede import Embedder
from halimede_ops import image, spec, vectors
from halimede_ops.errors import InvalidModel, UnsupportedInput
from halimede_tools.build import check, describe, export, model_config, towers
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.kinds.recognise import PREPROCESSING, recognise, takes_images_alone
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import corpus, pictures
from halimede_tools.build.vision import encoder, processor
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

SAME = 0.99999
"""Lowest cosine of FP32 to transformers."""
SERVED = {name: form.make for name, form in forms.IMAGES.items()}
IN_ALL_PRECISIONS = ("siglip", "vit")
POOLED = {
    small.vit_classifier: spec.CLS, small.deit: spec.CLS, small.ijepa: spec.MEAN,
    small.clip_vision: spec.IMAGE_EMBEDS, small.sentence_vit: spec.OWN_FEATURES,
}  # fmt: skip
"""What the vector is; of every other model, `pooler_output`."""


def files() -> list[bytes]:
    """Every form of pictures, twice."""
    return pictures.check_pictures(2 * len(pictures.FORMS))


def texts() -> list[str]:
    return ["", "a", *corpus.check_texts()[:98]]


def features(folder: Path, data: list[bytes]) -> np.ndarray:
    """What transformers itself gives for images, without any code of ours: `[images, dims]`."""
    prepare = hf.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    config = hf.AutoConfig.from_pretrained(folder)
    name = config.architectures[0]
    with_projection = "Projection" in name
    model = (getattr(hf, name) if with_projection else hf.AutoModel).from_pretrained(folder).eval()
    given = []
    for file in data:
        opened = load_image(Image.open(io.BytesIO(file)))
        # Left alone, the processor takes a picture 3 pixels high for one with channels first.
        values = prepare(opened, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            if hasattr(model, "get_image_features"):
                given.append(model.get_image_features(**values)[0])
                continue
            outputs = model(**values)
            if with_projection:
                given.append(outputs.image_embeds[0])
            elif name in ("ViTForImageClassification", "DeiTForImageClassificationWithTeacher"):
                given.append(outputs.last_hidden_state[0, 0])
            elif name == "IJepaModel":
                given.append(outputs.last_hidden_state[0].mean(dim=0))
            else:
                given.append(outputs.pooler_output[0].flatten())
    return torch.stack(given).numpy()


def text_features(folder: Path, given: list[str]) -> np.ndarray:
    """What transformers gives for texts padded to SigLIP's length: `[texts, dims]`."""
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(
        given, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return hf.SiglipModel.from_pretrained(folder).get_text_features(**tokens).numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("folders")
    return {name: make(parent / name) for name, make in SERVED.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Settings:
    """A repository with every model of SERVED. So small ones miss their sizes."""
    parent = tmp_path_factory.mktemp("images")
    settings = Settings(home=parent / "home", repository=parent / "repository")
    for name, folder in folders.items():
        precisions = ("fp32", "fp16", "int8") if name in IN_ALL_PRECISIONS else ("fp32",)
        request = build_request(str(folder), name, precisions=precisions, accepted=("fp16", "int8"))
        build(request, settings)
    return settings


@pytest.fixture(scope="module")
def server(home: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, free_options()) as running:
        yield running


@pytest.fixture(params=["triton", "onnx"])
def embedder_of(request: pytest.FixtureRequest, home: Settings) -> Callable[[str], Embedder]:
    """An Embedder for the name of an ensemble: by Triton, or in this process."""
    if request.param == "onnx":
        where = {"provider": "onnx", "path": str(home.repository)}
    else:
        where = {"provider": "triton", "url": request.getfixturevalue("server").grpc_address}
    return lambda name: Embedder(config={"models": {"m": {"model_id": name, **where}}})


@pytest.mark.parametrize("name", [name for name in SERVED if name != "plain-clip"])
def test_served_images_are_those_of_transformers(
    embedder_of: Callable[[str], Embedder], folders: dict[str, Path], name: str
) -> None:
    """Every form of pictures, together and alone. A model of images alone has its own name."""
    expected = features(folders[name], files())
    with embedder_of(name) as embedder:
        result = embedder.embed_images(files())
        alone = [embedder.embed_images([file]).vectors[0] for file in files()[:8]]
    assert vectors.cosine(result.vectors, expected).min() >= SAME
    assert vectors.cosine(np.stack(alone), expected[:8]).min() >= SAME
    if name == "siglip":
        expected = vectors.normalise(expected)
    assert np.allclose(result.vectors, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", IN_ALL_PRECISIONS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_reach_their_bars(
    embedder_of: Callable[[str], Embedder], folders: dict[str, Path], name: str, precision: str
) -> None:
    served = f"{name}-image-{precision}" if name == "siglip" else f"{name}-{precision}"
    with embedder_of(served) as embedder:
        got = embedder.embed_images(files()).vectors
    bar = towers.IMAGE_BARS[precision]
    assert vectors.cosine(got, features(folders[name], files())).mean() >= bar.mean_cosine


def test_siglips_texts_are_padded_as_it_was_trained(
    embedder_of: Callable[[str], Embedder], folders: dict[str, Path]
) -> None:
    """Alone and in batches, short, empty and too long: padding to 64 tokens counts as text."""
    expected = text_features(folders["siglip"], texts())
    with embedder_of("siglip") as embedder:
        together = embedder.embed(texts()).vectors
        alone = np.concatenate([embedder.embed([text]).vectors for text in texts()[:20]])
    assert vectors.cosine(together, expected).min() >= SAME
    assert vectors.cosine(alone, expected[:20]).min() >= SAME
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    with embedder_of("siglip-int8") as embedder:
        got = embedder.embed(texts()).vectors
    assert vectors.cosine(got, expected).mean() >= towers.BARS["int8"].mean_cosine


def test_a_model_of_images_alone_takes_no_texts(embedder_of: Callable[[str], Embedder]) -> None:
    """The error says what it takes."""
    with (
        embedder_of("vit") as embedder,
        pytest.raises(UnsupportedInput, match="embeds images, not"),
    ):
        embedder.embed(["a cat"])


def test_shorter_vectors(embedder_of: Callable[[str], Embedder], folders: dict[str, Path]) -> None:
    with embedder_of("vit") as embedder:
        cut = embedder.embed_images(files()[:4], dimensions=16).vectors
    expected = features(folders["vit"], files()[:4])[:, :16]
    assert vectors.cosine(cut, expected).min() >= SAME


def test_the_commands(server: wheel.Server, tmp_path: Path) -> None:
    """`embed-image` embeds with it, and `models` says that it takes images."""
    (tmp_path / "a.jpg").write_bytes(files()[0])
    url = server.grpc_address
    done = halimede("embed-image", str(tmp_path), "--json", "--model", "vit", "--url", url)
    [row] = json.loads(done.stdout)["embeddings"]
    assert len(row["embedding"]) == 64
    told = {
        row["name"]: row for row in json.loads(halimede("models", "--json", "--url", url).stdout)
    }
    assert (told["vit"]["input"], told["vit"]["max_tokens"]) == ("image", 0)
    assert (told["siglip"]["input"], told["siglip-image"]["input"]) == ("text", "image")
    assert told["siglip"]["space"] == told["siglip-image"]["space"]


def test_what_is_written(home: Settings) -> None:
    """A model of images alone is NAME, without a tokenizer and without a text model."""
    written = {path.name for path in home.repository.iterdir()}
    assert {"vit", "vit-pixels", "vit-onnx", "vit-pooler", "vit-int8"} <= written
    assert not {"vit-tokenizer", "vit-image"} & written
    parameters = model_config.read(home.repository / "vit" / "config.pbtxt").parameters
    assert parameters["input"].string_value == "image"
    assert "text_model" not in parameters and "kind" not in parameters
    facts = spec.load(version_folder(home.repository / "vit"))
    assert (facts.kind, facts.takes_texts) == (spec.DENSE, False)
    assert facts.images().pooling == spec.POOLER_OUTPUT
    quality = json.loads((version_folder(home.repository / "vit") / "quality.json").read_text())
    assert quality["images"] == towers.CHECK_PICTURES and quality["space"] == facts.space


def test_a_clip_without_preprocessing_has_that_of_its_kin(
    folders: dict[str, Path], home: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images are those of a CLIPImageProcessor for its size, and the build says so."""
    facts = spec.load(version_folder(home.repository / "plain-clip-image"))
    own = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=small.SQUARE)
    assert facts.images() == processor.image_spec(own, "clip", positions=5)
    whole = shutil.copytree(folders["plain-clip"], tmp_path / "clip")
    own.save_pretrained(whole)
    model = describe.load(whole, ModelOptions("plain-clip"))
    assert describe.describe(model, whole, ModelOptions("plain-clip")) == facts
    request = build_request(str(folders["plain-clip"]), "plain-clip", precisions=("fp32",))
    build(request, home)
    assert f"has no {PREPROCESSING}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "make", [form.make for form in forms.IMAGE_GRAPHS.values()], ids=list(forms.IMAGE_GRAPHS)
)
def test_every_architecture(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Its graph gives transformers' vectors for every form of pictures, by OpenVINO's engine."""
    folder, out = make(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    assert takes_images_alone(folder) and recognise(folder, "m") == spec.DENSE
    export.export_images(folder, ModelOptions("m"), out)
    facts = spec.load(out)
    assert facts.images().pooling == POOLED.get(make, spec.POOLER_OUTPUT)
    given = files()[: len(pictures.FORMS)]
    got = towers.Engine(out / "model.onnx", towers.image_rows(out, facts), facts).embed(given)
    if make is small.sentence_vit:
        opened = [load_image(Image.open(io.BytesIO(file))) for file in given]
        whole = [row for row, picture in enumerate(opened) if min(picture.size) > 3]
        model = SentenceTransformer(str(folder), device="cpu")
        reference = model.encode([opened[row] for row in whole])
        assert np.allclose(got[whole], reference, atol=1e-5)
    else:
        assert check.cosines_to(got, features(folder, given)).min() >= SAME


def test_siglips_tokenizers(tmp_path: Path) -> None:
    """A tokenizer whose class exists in a slow form alone is read from tokenizer.json; one that
    gives a mask is followed.
    """
    for name, folder in (
        ("first", small.siglip_1(tmp_path / "first")),
        ("masked", small.siglip(tmp_path / "masked", masked=True)),
    ):
        out = tmp_path / f"{name}-out"
        out.mkdir()
        export.export(folder, ModelOptions(name), out)
        facts = spec.load(out)
        engine = towers.Engine(out / "model.onnx", towers.text_rows(out, facts), facts)
        expected = text_features(folder, texts())
        assert vectors.cosine(engine.embed(texts()), expected).min() >= SAME
        reference = check.reference(folder, texts(), ModelOptions(name))
        assert vectors.cosine(reference, expected).min() >= SAME


WIDE = {"height": 40, "width": 60}
PROCESSORS = {
    "ViT": hf.ViTImageProcessor(size=WIDE),
    "ViT, nearest, not scaled": hf.ViTImageProcessor(size=WIDE, resample=0, do_rescale=False),
    "ViT, not normalised": hf.ViTImageProcessor(size=WIDE, do_normalize=False),
    "SigLIP": hf.SiglipImageProcessor(size=WIDE, image_mean=0.4, image_std=0.3),
    "CLIP, not resized": hf.CLIPImageProcessor(do_resize=False, crop_size=WIDE),
    "CLIP, sides": hf.CLIPImageProcessor(size=WIDE, do_center_crop=False),
    "Bit": hf.BitImageProcessor(size={"shortest_edge": 30}, crop_size=WIDE),
    "DeiT": hf.DeiTImageProcessor(size={"height": 50, "width": 50}, crop_size=WIDE),
    "BEiT": hf.BeitImageProcessor(size=WIDE, crop_size=small.SQUARE, do_reduce_labels=True),
    "ConvNeXt, cropped": hf.ConvNextImageProcessor(size={"shortest_edge": 40}, crop_pct=0.9),
    "ConvNeXt, squeezed": hf.ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=0.9),
    "LeViT": hf.LevitImageProcessor(size={"shortest_edge": 40}, crop_size=small.SQUARE),
    "PoolFormer, by ratio": hf.PoolFormerImageProcessor(
        size={"shortest_edge": 40}, crop_pct=0.9, crop_size=small.SQUARE
    ),
    "PoolFormer, a square by ratio": hf.PoolFormerImageProcessor(
        size=small.SQUARE, crop_pct=0.7, crop_size=WIDE
    ),
    "PoolFormer, sides": hf.PoolFormerImageProcessor(
        size=WIDE, crop_pct=None, crop_size=small.SQUARE
    ),
    "PVT": hf.PvtImageProcessor(size=WIDE),
    "MobileNet v1": hf.MobileNetV1ImageProcessor(
        size={"shortest_edge": 40}, crop_size=small.SQUARE
    ),
    "MobileNet v2": hf.MobileNetV2ImageProcessor(size=WIDE, crop_size=small.SQUARE),
    "MobileViT": hf.MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size=small.SQUARE),
    "MobileViT, RGB": hf.MobileViTImageProcessor(
        size={"shortest_edge": 40}, crop_size=small.SQUARE, do_flip_channel_order=False
    ),
    "EfficientNet": hf.EfficientNetImageProcessor(size=WIDE, rescale_factor=1 / 127.5,
                                                  rescale_offset=True),
    "EfficientNet, cropped": hf.EfficientNetImageProcessor(
        size=WIDE, do_center_crop=True, crop_size=small.SQUARE, include_top=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_option_of_a_processor(name: str, tmp_path: Path) -> None:
    """Read from the file that it saves, it gives transformers' pixels, within 1e-5 of 1."""
    PROCESSORS[name].save_pretrained(tmp_path)
    own = processor.image_processor(tmp_path, "m")
    taken = processor.image_spec(own, "m")
    for data in files()[: len(pictures.FORMS)]:
        got = scaled(image.prepare(data, taken).pixels, taken)
        expected = pixel_values(data, own)
        assert np.abs((got[::-1] if taken.bgr else got) - expected).max() <= 1e-5 * max(
            1, np.abs(expected).max()
        )


@pytest.mark.parametrize("name", processor.PROCESSORS)
def test_every_option_is_known(name: str) -> None:
    """An option of a class that is not honoured must be one that changes no pixel."""
    known = set(inspect.signature(getattr(hf, name).__init__).parameters) - {"self", "kwargs"}
    assert known <= processor.HONOURED | processor.NO_EFFECT


def test_names_of_other_releases(tmp_path: Path) -> None:
    """The older and the faster forms of a class, a file that names none, and the file of newer
    releases, mean the same.
    """
    whole = json.loads(hf.ViTImageProcessor(size=WIDE).to_json_string())
    whole.pop("image_processor_type")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    expected = processor.image_spec(hf.ViTImageProcessor(size=WIDE), "m")
    for fields in (
        {"image_processor_type": "ViTImageProcessorFast", "do_center_crop": None},
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {},
    ):
        (tmp_path / PREPROCESSING).write_text(json.dumps(whole | fields))
        assert processor.image_spec(processor.image_processor(tmp_path, "m"), "m") == expected
    (tmp_path / PREPROCESSING).unlink()
    newer = {"image_processor": whole | {"image_processor_type": "ViTImageProcessor"}}
    (tmp_path / processor.PROCESSOR).write_text(json.dumps(newer))
    assert processor.image_spec(processor.image_processor(tmp_path, "m"), "m") == expected


REFUSED = {
    "another class": ("names DonutImageProcessor", {"image_processor_type": "DonutImageProcessor"}),
    "an unknown option": ("asks for do_center_crop", {"do_center_crop": True, "crop_size": 8}),
    "padding": ("asks for do_pad", {"do_pad": True}),
    "a form of size": ("needs a height and a width", {"size": {"shortest_edge": 32}}),
    "images of any size": ("different sizes", {"do_resize": False}),
    "another size": ("does not take the images .* 48 x 48", {"size": {"height": 48, "width": 48}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_preprocessing_that_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The error names the option or the class, and what is wrong with it."""
    match, fields = REFUSED[name]
    folder = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    path = folder / PREPROCESSING
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InvalidModel, match=match):
        encoder.load(folder, ModelOptions("vit"))


def test_folders_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each error names the cause and the remedy."""

    def refused(match: str, source: str, change: Callable[[Path], Any], **options: Any) -> None:
        folder = Path(shutil.copytree(folders[source], tmp_path / match.replace("/", "")))
        change(folder)
        with pytest.raises(InvalidModel, match=match):
            export_any(folder, ModelOptions("m", **options))

    def remove(name: str) -> Callable[[Path], Any]:
        return lambda folder: (folder / name).unlink()

    refused(f"has no {PREPROCESSING}: .* Add the file", "vit", remove(PREPROCESSING))
    refused("takes images alone: leave max_tokens out", "vit", lambda _: None, max_tokens=8)
    refused("lacks 2 of its weights, such as", "vit", lose_a_weight)
    refused(r"SigLIP's\s+spiece.model", "siglip", remove("tokenizer.json"))
    refused("takes no other limit", "siglip", lambda _: None, max_tokens=32)
    refused("NaFlex", "siglip", with_field("model_type", "siglip2"))
    for other in ("altclip", "chinese_clip", "blip"):
        refused(
            f"is a {other}, a model of texts and images", "siglip", with_field("model_type", other)
        )
    refused("is a CLIPModel, which takes texts", "plain-clip", without_tokenizer)


def export_any(folder: Path, options: ModelOptions) -> None:
    if takes_images_alone(folder):
        encoder.load(folder, options)
    else:
        describe.load(folder, options)


def with_field(key: str, value: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def lose_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("layernorm.")}
    save_file(kept, path, {"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=small.SQUARE).save_pretrained(
        folder
    )
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()


CHANGES: dict[str, dict[str, Any]] = {
    "resample": {"resample": 3}, "mean": {"image_mean": [0.4, 0.5, 0.5]},
    "std": {"image_std": [0.4, 0.5, 0.5]}, "scale": {"rescale_factor": 1 / 127.5},
    "rescaling": {"do_rescale": False}, "normalisation": {"do_normalize": False},
}  # fmt: skip


def test_the_space_covers_preprocessing_and_pooling(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever changes a pixel or the choice of the vector makes another space."""

    def space(name: str, fields: dict[str, Any]) -> str:
        folder = Path(shutil.copytree(folders["vit"], tmp_path / name))
        path = folder / PREPROCESSING
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return encoder.load(folder, ModelOptions("vit")).spec.space

    spaces = [space("same", {}), *(space(name, fields) for name, fields in CHANGES.items())]
    assert len(set(spaces)) == 1 + len(CHANGES)
    assert spaces[0] == encoder.load(folders["vit"], ModelOptions("vit")).spec.space
    one, other = (spec.ImageSpec(8, 8, (), 0, 1.0, (), (), 1, pooling=p) for p in ("cls", "mean"))
    assert one.decides() != other.decides()
